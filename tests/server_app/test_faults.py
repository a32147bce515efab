"""The fault table, in memory: what goes wrong where, and what becomes of the run. docs/reliability.md lists it.

Processes that are killed for real are in tests/network/test_faults.py; a server that is killed after every single
record in tests/server_app/test_run.py.
"""

from pathlib import Path

import pytest

import server_app.evaluation
import server_app.export
import server_app.rounds
from deploy.testing import Killed
from fedtune_strategies.errors import DataError, LinkError, NodesError, ResourceError
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.records import from_record
from server_app.ledger import Ledger
from server_app.replay import replay
from server_app.run import execute
from tests.faults import FaultyGrid
from tests.federations import final_state

METHODS = ["fedkseed", "fedcybgd"]
GONE, CRASHED = (5, "Node Unavailable"), (8, "client app process ended")
SOON, LATE = 2, 10**3  # looks of the server


def failure(exit_code, line):
    message = protocol.Failure(exit_code, line)
    return message.kind, protocol.encode(message)


# --- What the node's side does to one task ---------------------------------------------------------------


def node_killed_before_the_task(grid, number, message):
    grid.away(number, SOON)
    return {"error": GONE}


def node_killed_in_training(grid, number, message):
    grid.train(number, message)  # it did its work, and all that it held is lost
    grid.away(number, SOON)
    return {"error": GONE, "after": 2}


def node_back_under_another_id(grid, number, message):
    grid.away(number, SOON, new_id=77)
    return {"error": GONE}


def node_back_before_its_old_connection_is_given_up(grid, number, message):
    grid.restart(number, new_id=77)
    grid.later.append((grid.looks + SOON, lambda: grid.nodes.pop(number)))
    return {"error": GONE, "after": SOON}


def node_hangs(grid, number, message):
    return {}  # no reply ever; a later hello is answered


def node_disconnected_in_upload(grid, number, message):
    grid.train(number, message)
    grid.nodes.pop(number)
    grid.later.append((grid.looks + SOON, lambda: grid.nodes.update({number: grid.workers[number].handle})))
    return {"error": GONE, "after": 2}


def node_slow(grid, number, message):
    return {"content": grid.train(number, message), "after": SOON}


def reply_after_the_deadline(grid, number, message):
    return {"content": grid.train(number, message), "after": LATE}


def app_raises(grid, number, message):
    return {"error": (2, "power cut")}


def app_killed(grid, number, message):
    grid.train(number, message)
    return {"error": CRASHED, "after": 2}


def worker_killed(grid, number, message):
    grid.restart(number)  # the messenger asks its successor, which holds the base model alone
    return {"content": grid.train(number, message)}


def worker_hangs(grid, number, message):
    return {"error": (2, "the worker did not answer within 600 s and was ended: raise 'round.deadline'")}


def worker_runs_out_of_memory(grid, number, message):
    return {"content": failure(ResourceError.exit_code, "not enough memory for the task on this node.")}


def reply_damaged(grid, number, message):
    kind, payload = grid.train(number, message)
    return {"content": (kind, payload[:50] + b"\xff" + payload[51:])}


def reply_cut_short(grid, number, message):
    kind, payload = grid.train(number, message)
    return {"content": (kind, payload[:-3])}


def task_damaged(grid, number, message):
    kind, payload = from_record(message.content)
    return {"content": grid.workers[number].handle(kind, payload[: len(payload) // 2])}


def data_gone(grid, number, message):
    return {"content": failure(DataError.exit_code, "data.jsonl: no such file")}


FAULTS = {
    # role, stage: (what happens, what the ledger must say of it)
    "SuperNode, before the task, killed": (node_killed_before_the_task, "Node Unavailable"),
    "SuperNode, training, killed": (node_killed_in_training, "Node Unavailable"),
    "SuperNode, training, killed, back under another id": (node_back_under_another_id, "Node Unavailable"),
    "SuperNode, training, killed, back at once under another id": (
        node_back_before_its_old_connection_is_given_up,
        "Node Unavailable",
    ),
    "SuperNode, training, hangs": (node_hangs, "did not answer within"),
    "SuperNode, upload, slow": (node_slow, ""),
    "network, download, damaged": (task_damaged, "damaged"),
    "network, upload, disconnected": (node_disconnected_in_upload, "Node Unavailable"),
    "network, upload, after the deadline": (reply_after_the_deadline, "did not answer within"),
    "network, upload, damaged": (reply_damaged, "damaged"),
    "network, upload, cut short": (reply_cut_short, "damaged"),
    "ClientApp, before the task, exception": (app_raises, "power cut"),
    "ClientApp, training, killed": (app_killed, "client app process ended"),
    "worker, training, killed": (worker_killed, ""),
    "worker, training, hangs": (worker_hangs, "did not answer within 600 s"),
    "worker, training, out of memory": (worker_runs_out_of_memory, "not enough memory"),
    "data file, before the task, gone": (data_gone, "no such file"),
}


@pytest.fixture
def faulty(settings):
    return settings | {
        "num-server-rounds": 3,
        "strategy.min-replies": 3,
        "eval.data": "",
        "round.deadline": 1.0,
        "round.node-wait": 20.0,
        "train.local-steps": 2,
    }


@pytest.fixture(scope="module")
def undisturbed():
    """The end of an undisturbed run, by settings: made once."""
    return {}


def told(settings):
    ledger = Ledger.read(Path(settings["run.dir"]))
    return [record for record in ledger.records() if record.kind in ("refused", "lost", "late")]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_of_a_node_changes_nothing(faulty, data_files, method, fault, undisturbed, tmp_path):
    """Asked again, the node gives what it would have given; under FedCyBGD another one may take the turn."""
    settings = faulty | {"method.name": method, "strategy.min-replies": 1 if method == "fedcybgd" else 3}
    happen, words = FAULTS[fault]
    if method not in undisturbed:
        quiet = settings | {"run.dir": str(tmp_path / "quiet")}
        execute(FaultyGrid(quiet, data_files), quiet, run_id=1)
        undisturbed[method] = final_state(quiet)
    victim = 2 if method == "fedcybgd" else 1  # whose turn round 2 is
    grid = FaultyGrid(settings, data_files, happen, victim=victim)
    execute(grid, settings, run_id=1)
    assert grid.happened == 1
    ledger = Ledger.read(Path(settings["run.dir"]))
    replies = [(record.round, record.node) for record in ledger.records("reply")]
    assert len(replies) == len(set(replies)) and ledger.last("round").round == 3
    reasons = [record.body["reason"] for record in told(settings)]
    assert any(words in reason for reason in reasons) or not words, reasons
    if method == "fedkseed" or not words:
        assert final_state(settings) == undisturbed[method]
    else:
        assert final_state(settings)[0] == 3


@pytest.mark.parametrize("fault", ["SuperNode, training, hangs", "ClientApp, training, killed"])
def test_with_k_of_n_the_round_goes_on_without_the_node(faulty, data_files, fault):
    settings = faulty | {"strategy.min-replies": 2, "strategy.min-nodes": 2}
    execute(FaultyGrid(settings, data_files, FAULTS[fault][0]), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert [len(record.body["replies"]) for record in ledger.records("round")] == [3, 2, 3]
    assert {record.node for record in told(settings)} == {"node-0"}


def test_a_node_that_hangs_costs_one_deadline_and_is_named(faulty, data_files, caplog):
    settings = faulty | {"strategy.min-replies": 2, "strategy.min-nodes": 2}

    def hangs_for_good(grid, number, message):
        grid.dead.add(number)
        return {}

    execute(FaultyGrid(settings, data_files, hangs_for_good), settings, run_id=1)
    asked = [list(record.body["nodes"]) for record in Ledger.read(Path(settings["run.dir"])).records("asked")]
    assert asked == [["node-0", "node-1", "node-2"]] * 2 + [["node-1", "node-2"]]
    assert "round 3: missing: node-0 since" in caplog.text and "did not answer within" in caplog.text


def test_a_late_reply_is_noted_and_counts_nowhere(faulty, data_files):
    settings = faulty | {"strategy.min-replies": 2, "strategy.min-nodes": 2}

    def late(grid, number, message):
        return {"content": grid.train(number, message), "after": SOON + 4}

    settings |= {"round.grace": 0.01, "num-server-rounds": 5}
    execute(FaultyGrid(settings, data_files, late), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert "node-0" not in next(iter(ledger.records("round", round=2))).body["replies"]
    assert [record.kind for record in told(settings)] == ["lost", "late"]


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed-pro"])
def test_a_late_reply_counts_in_the_next_round_where_asked_to(faulty, data_files, method, tmp_path):
    settings = faulty | {"strategy.min-replies": 2, "strategy.min-nodes": 2, "method.name": method}
    settings |= {"round.grace": 0.01, "num-server-rounds": 5, "strategy.late": 0.5}

    def late(grid, number, message):
        grid.dead.add(number)  # a node at work hears no greeting
        return {"content": grid.train(number, message), "after": SOON + 4}

    execute(FaultyGrid(settings, data_files, late), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    counted = [(record.round, record.body["round"]) for record in ledger.records("reply") if record.node == "node-0"]
    assert counted == [(1, 1), (3, 2)]
    assert [record.kind for record in told(settings)] == ["lost"]
    # The recorded replies alone make the same model.
    assert replay(Path(settings["run.dir"])).kept == sum(len(r.body["replies"]) for r in ledger.records("round"))


# --- The server's side -----------------------------------------------------------------------------------


def disk_full(*args, **kwargs):
    raise ResourceError("cannot write the ledger: database or disk is full; free space, then start the run again.")


def killed(*args, **kwargs):
    raise Killed


def superlink_gone(*args, **kwargs):
    raise LinkError("the SuperLink does not answer.")


SERVER_FAULTS = {
    "disk, commit, full": (Ledger, "append", disk_full, "round"),
    "disk, commit of a file, full": (Ledger, "put_file", disk_full, ""),
    "disk, upload, full": (Ledger, "append", disk_full, "reply"),
    "disk, export, full": (server_app.export, "export_model", disk_full, ""),
    "ServerApp, download, killed": (Ledger, "append", killed, "asked"),
    "ServerApp, commit, killed": (Ledger, "append", killed, "round"),
    "ServerApp, commit of a file, killed": (Ledger, "put_file", killed, ""),
    "ServerApp, evaluation, killed": (server_app.evaluation, "evaluate", killed, ""),
    "ServerApp, export, killed": (server_app.export, "export_model", killed, ""),
    "SuperLink, upload, gone": (FaultyGrid, "pull_messages", superlink_gone, ""),
}


# FedKSeed's state is small: it stores no files.
@pytest.mark.parametrize(
    ("method", "fault"),
    [
        (method, fault)
        for method in METHODS
        for fault, (_, name, *_) in SERVER_FAULTS.items()
        if (method, name) != ("fedkseed", "put_file")
    ],
)
def test_a_run_whose_server_fails_goes_on_to_the_same_model(
    faulty, data_files, method, fault, undisturbed, tmp_path, monkeypatch
):
    settings = faulty | {"method.name": method, "strategy.min-replies": 1 if method == "fedcybgd" else 3}
    settings |= {"eval.data": str(tmp_path / "held_out.jsonl"), "eval.answers": 0}
    owner, name, happen, kind = SERVER_FAULTS[fault]
    if method not in undisturbed:
        quiet = settings | {"run.dir": str(tmp_path / "quiet")}
        execute(FaultyGrid(quiet, data_files), quiet, run_id=1)
        undisturbed[method] = final_state(quiet)
    good, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(not kind or kind in args)
        return happen() if sum(calls) == 2 or (happen is superlink_gone and sum(calls) == 8) else good(*args, **kwargs)

    grid = FaultyGrid(settings, data_files)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        if name == "export_model":
            patch.setattr(owner, name, happen)
        with pytest.raises((Killed, ResourceError, LinkError)):
            execute(grid, settings, run_id=1)
    execute(grid, settings, run_id=2)
    assert final_state(settings) == undisturbed[method]
    assert (Path(settings["run.dir"]) / "model" / "model.safetensors").exists()


def test_too_few_nodes_is_one_line_after_a_bounded_wait(faulty, data_files):
    grid = FaultyGrid(faulty, data_files)
    del grid.nodes[1]
    with pytest.raises(NodesError, match="2 of 3 nodes joined within 0 s"):
        execute(grid, faulty | {"round.node-wait": 0.2}, run_id=1)
