"""Whole runs over an in-memory grid: results, resumption, refusals."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.testing import Killed, killed_after
from fedtune_strategies.errors import DataError, FingerprintError, LedgerError, ModelError, NodesError
from fedtune_strategies.fedavg.messages import ArraysReply
from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.replay import replay
from server_app.run import execute
from tests.conftest import write_rows
from tests.federations import assert_resumes_exactly, final_state, make_grid, make_nodes, run, run_with_restarts

METHODS = ["fedkseed", "fedkseed-pro", "fedcybgd", "fedavg"]


@pytest.mark.parametrize("method", [*METHODS, "fedit", "fedzo"])
def test_a_run_learns_and_exports_a_loadable_model(settings, data_files, method):
    step = 1e-2 if method in ("fedcybgd", "fedavg", "fedit") else 3e-4
    settings |= {"method.name": method, "num-server-rounds": 6, "train.lr": step}
    ledger = run(settings, data_files)
    losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
    assert len(losses) == 7 and losses[-1] < losses[0]
    folder = ledger.last("finished").body["model"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    card = (Path(folder) / "README.md").read_text()
    assert method in card and "| 6 |" in card


@pytest.mark.parametrize("method", [*METHODS, "fedit", "fedzo"])
def test_the_same_seed_gives_the_same_model(settings, data_files, method, tmp_path):
    first = settings | {"method.name": method}
    second = first | {"run.dir": str(tmp_path / "again")}
    other = first | {"run.dir": str(tmp_path / "other"), "train.seed": 1}
    for flat in (first, second, other):
        run(flat, data_files)
    assert final_state(first) == final_state(second)
    assert final_state(first) != final_state(other)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_nodes_and_replies_does_not_matter(settings, data_files, method, tmp_path):
    first = settings | {"method.name": method}
    second = first | {"run.dir": str(tmp_path / "again")}
    run(first, data_files)
    run(second, dict(reversed(data_files.items())))
    assert final_state(first) == final_state(second)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_any_record_resumes_to_the_same_bits(settings, data_files, method, tmp_path):
    settings |= {"method.name": method, "num-server-rounds": 2, "eval.answers": 0}
    assert_resumes_exactly(settings, data_files, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_restarted_worker_gets_what_it_lacks_again(settings, data_files, tmp_path, method):
    settings |= {"method.name": method, "num-server-rounds": 6 if method == "fedcybgd" else 3}
    forgetful = settings | {"run.dir": str(tmp_path / "forgetful")}
    run(settings, data_files)
    run_with_restarts(forgetful, data_files)
    assert final_state(forgetful) == final_state(settings)


def test_cybgd_sends_only_what_changed(settings, data_files):
    settings |= {"method.name": "fedcybgd", "num-server-rounds": 9}
    ledger = run(settings, data_files)
    down = [record.body["bytes_down"] for record in ledger.records("reply")]
    # Base weights lie on every node: the first turn brings nothing, later ones the blocks changed since.
    assert down[0] < 1000 < max(down)
    sizes = [len(ledger.payload(record)) for record in ledger.records("reply")]
    whole = sum(value.nbytes for value in AutoModelForCausalLM.from_pretrained(settings["model.name"]).parameters())
    assert max(down) < whole and max(sizes) < whole


def test_cybgd_visits_every_block_and_changes_only_it(settings, data_files):
    settings |= {"method.name": "fedcybgd", "num-server-rounds": 5}
    ledger = run(settings, data_files)
    rounds = list(ledger.records("round"))
    cycle = [0, 1, 2, 3, 0]  # embedding, two layers, the second with the final norm, and head
    assert [record.body["metrics"]["blocks"] for record in rounds] == [[block] for block in cycle]
    assert [list(record.body["files"]) for record in rounds] == [[f"block-{block}"] for block in cycle]


@pytest.mark.parametrize("method", METHODS)
def test_a_node_that_fails_is_named_and_the_run_goes_on(settings, data_files, method):
    settings |= {"method.name": method, "num-server-rounds": 3, "strategy.min-nodes": 2}
    nodes = make_nodes(settings, data_files)

    def broken(kind, payload):
        if kind != "hello":
            raise RuntimeError("power cut")
        return nodes[1].handle(kind, payload)

    grid = InMemoryGrid({1: broken, 2: nodes[2].handle, 3: nodes[3].handle})
    execute(grid, settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert ledger.last("round").round == 3
    assert {record.node for record in ledger.records("reply")} == {"node-1", "node-2"}
    refused = [record for record in ledger.records("refused") if record.round]
    assert refused and all(record.node == "node-0" and "power cut" in record.body["reason"] for record in refused)


def forge(node, change):
    """Make a handler that changes a node's training replies."""

    def handle(kind, payload):
        kind, payload = node.handle(kind, payload)
        message = protocol.decode(kind, payload)
        if isinstance(message, SeedReply | ArraysReply):
            message = change(message)
        return message.kind, protocol.encode(message)

    return handle


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: replace(reply, fingerprint="0" * 16), "other weights"),
        (lambda reply: replace(reply, round=7), "round 7"),
        (lambda reply: replace(reply, node="node-1"), "node-1"),
        (lambda reply: replace(reply, scalars=reply.scalars[:-1]), "scalars"),
        (lambda reply: replace(reply, scalars=reply.scalars.double()), "float64"),
        (lambda reply: replace(reply, scalars=reply.scalars * torch.nan), "finite"),
        (lambda reply: replace(reply, num_examples=-5), "num_examples is not within"),
        (lambda reply: protocol.Ack(reply.node, reply.round), "ack"),
        (lambda reply: protocol.Failure(13, "no memory left"), "no memory left"),
    ],
)
def test_a_reply_that_does_not_fit_is_left_out_with_its_reason(settings, data_files, change, reason, tmp_path):
    settings |= {"num-server-rounds": 1, "strategy.min-nodes": 2}
    nodes = make_nodes(settings, data_files)
    grid = InMemoryGrid({1: forge(nodes[1], change), 2: nodes[2].handle, 3: nodes[3].handle})
    execute(grid, settings, run_id=1)
    honest = settings | {"run.dir": str(tmp_path / "honest")}
    execute(InMemoryGrid({2: nodes[2].handle, 3: nodes[3].handle}), honest, run_id=1)
    refused = [r for r in Ledger.read(Path(settings["run.dir"])).records("refused") if r.round]
    assert [record.node for record in refused] == ["node-0"]
    assert reason in refused[0].body["reason"]
    # What is left out has no trace in the model.
    assert final_state(settings)[1] == final_state(honest)[1]


def test_steps_that_are_not_finite_are_skipped_and_counted(settings, data_files):
    settings |= {"num-server-rounds": 1}
    nodes = make_nodes(settings, data_files)

    def spoil(reply):
        reply.scalars[:2] = torch.tensor([torch.nan, torch.inf])
        return reply

    grid = InMemoryGrid({1: forge(nodes[1], spoil), 2: nodes[2].handle, 3: nodes[3].handle})
    execute(grid, settings, run_id=1)
    last = Ledger.read(Path(settings["run.dir"])).last("round")
    assert last.body["metrics"]["train/skipped"] > 0
    assert safetensors.torch.load(Ledger.read(Path(settings["run.dir"])).payload(last))["theta"].isfinite().all()


def test_steps_skipped_in_averaging_are_recorded(settings, data_files):
    settings |= {"num-server-rounds": 1, "method.name": "fedavg"}
    nodes = make_nodes(settings, data_files)
    grid = {number: forge(node, lambda reply: replace(reply, skipped=2)) for number, node in nodes.items()}
    execute(InMemoryGrid(grid), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert {record.body["skipped"] for record in ledger.records("reply")} == {2}
    assert ledger.last("round").body["metrics"]["train/skipped"] == pytest.approx(2)


def test_nodes_are_greeted_before_the_server_loads_its_model(settings, monkeypatch):
    greeted = []

    def load(*_):
        raise ModelError(f"by then {len(greeted)} nodes were greeted")

    monkeypatch.setattr("server_app.base_model.load_base", load)
    grid = InMemoryGrid({i: lambda kind, payload: greeted.append(kind) for i in range(3)})
    with pytest.raises(ModelError, match="by then 3 nodes"):
        execute(grid, settings, run_id=1)


def test_a_node_with_another_base_model_takes_no_part(settings, data_files, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    next(iter(other.parameters())).data[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(settings["model.name"]).save_pretrained(tmp_path / "other")
    settings |= {"strategy.min-nodes": 2}
    nodes = make_nodes(settings, data_files)
    stranger = make_nodes(settings | {"model.name": str(tmp_path / "other")}, data_files)[1]
    execute(InMemoryGrid({1: stranger.handle, 2: nodes[2].handle, 3: nodes[3].handle}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert "another base model" in next(ledger.records("refused")).body["reason"]
    assert {record.node for record in ledger.records("reply")} == {"node-1", "node-2"}


def test_when_every_node_is_refused_for_one_reason_the_run_ends_with_it(settings, data_files, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    next(iter(other.parameters())).data[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(settings["model.name"]).save_pretrained(tmp_path / "other")
    nodes = make_nodes(settings | {"model.name": str(tmp_path / "other")}, data_files)
    with pytest.raises(FingerprintError, match="0 of 3 nodes"):
        execute(make_grid(nodes), settings, run_id=1)
    failed = Ledger.read(Path(settings["run.dir"])).last("failed")
    assert failed.body["exit_code"] == FingerprintError.exit_code


def test_two_nodes_of_one_name(settings, data_files):
    settings |= {"strategy.min-nodes": 1, "num-server-rounds": 1}
    nodes = make_nodes(settings, data_files)
    execute(InMemoryGrid({1: nodes[1].handle, 2: nodes[1].handle}), settings, run_id=1)
    assert "name 'node-0'" in next(Ledger.read(Path(settings["run.dir"])).records("refused")).body["reason"]


def test_no_nodes_at_all(settings):
    settings |= {"round.node-wait": 0.5}
    with pytest.raises(NodesError, match=r"0 of 3 nodes.*strategy\.min-nodes"):
        execute(InMemoryGrid({}), settings, run_id=1)


def test_too_few_replies_end_the_run_but_keep_it(settings, data_files):
    settings |= {"strategy.min-replies": 3, "round.attempts": 2}
    nodes = make_nodes(settings, data_files)

    def broken(kind, payload):
        if kind != "hello":
            raise RuntimeError("power cut")
        return nodes[1].handle(kind, payload)

    with pytest.raises(NodesError, match=r"round 1.*2 attempts.*power cut"):
        execute(InMemoryGrid({1: broken, 2: nodes[2].handle, 3: nodes[3].handle}), settings, run_id=1)
    execute(make_grid(nodes), settings, run_id=2)
    assert Ledger.read(Path(settings["run.dir"])).last("round").round == 3


def test_a_run_goes_on_with_more_rounds_but_not_with_other_settings(settings, data_files):
    run(settings, data_files)
    with pytest.raises(LedgerError, match=r"train\.lr"):
        run(settings | {"train.lr": 0.5}, data_files)
    ledger = run(settings | {"num-server-rounds": 4}, data_files)
    assert [record.round for record in ledger.records("round")] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", ["fedkseed", "fedcybgd"])
def test_rounds_that_have_begun_keep_their_step_size_when_a_run_gets_more_of_them(
    settings, data_files, method, tmp_path
):
    settings |= {"method.name": method, "train.lr-schedule": "linear", "num-server-rounds": 2, "strategy.late": 0.5}
    asked = next(run(settings, data_files).records("asked", round=2))
    folder = tmp_path / "killed"
    settings |= {"run.dir": str(folder)}
    nodes = make_nodes(settings, data_files)
    with pytest.raises(Killed), killed_after(asked.seq):
        execute(make_grid(nodes), settings, run_id=1)
    execute(make_grid(nodes), settings | {"num-server-rounds": 4}, run_id=2)
    shares = [record.body["used"]["schedule"] for record in Ledger.read(folder).records("round")]
    assert shares == [0.75, 0.25, 0.375, 0.125]  # two of two rounds, then the last two of four
    assert replay(folder).rounds == 4


def test_bytes_of_a_refused_reply_and_of_the_base_model_are_on_record(settings, data_files, tmp_path):
    settings |= {"strategy.min-replies": 2, "num-server-rounds": 2}
    nodes, down, up = make_nodes(settings, data_files), Counter(), Counter()
    third = {"node-2": data_files["node-2"]}
    nodes[3] = make_nodes(settings, third, model="server", cache=str(tmp_path / "cache"))[1]

    def counting(number):
        def handle(kind, payload):
            name, body = nodes[number].handle(kind, payload)
            if number == 1 and kind == "seed-task":
                body = body[:-1]
            down[kind], up[kind] = down[kind] + len(payload), up[kind] + len(body)
            return name, body

        return handle

    execute(InMemoryGrid({number: counting(number) for number in nodes}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    recorded = {kind: list(ledger.records(kind)) for kind in ("joined", "refused", "reply")}
    told = {kind: sum(one.body["bytes_down"] for one in records) for kind, records in recorded.items()}
    assert len(recorded["refused"]) == 2 and told["joined"] == down["model-manifest"] + down["model-chunk"] > 10_000
    assert told["refused"] + told["reply"] == down["seed-task"]
    assert sum(one.body["bytes_up"] for one in recorded["refused"] + recorded["reply"]) == up["seed-task"]


def test_a_start_that_asked_nobody_does_not_lock_the_folder(settings, data_files):
    with pytest.raises(ModelError):
        execute(make_grid({}), settings | {"model.name": "/no/such/model"}, run_id=1)
    assert run(settings, data_files).last("finished") is not None


def test_resume_never_and_always(settings, data_files):
    with pytest.raises(LedgerError, match="no run to resume"):
        run(settings | {"run.resume": "always"}, data_files)
    run(settings | {"run.resume": "never"}, data_files)
    with pytest.raises(LedgerError, match="a run already"):
        run(settings | {"run.resume": "never"}, data_files)


def test_bad_input_on_the_server_is_one_line_and_recorded(settings, data_files, tmp_path):
    with pytest.raises(ModelError) as caught:
        run(settings | {"model.name": str(tmp_path / "nothing")}, {})
    assert "\n" not in str(caught.value)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n{broken\n")
    with pytest.raises(DataError, match="line 2"):
        run(settings | {"eval.data": str(broken), "run.dir": str(tmp_path / "second")}, {})
    assert Ledger.read(tmp_path / "second").last("failed").body["exit_code"] == DataError.exit_code


def test_sampling_asks_a_fraction_of_the_nodes(settings, tmp_path):
    files = {f"node-{i}": write_rows(tmp_path / f"n{i}.jsonl", 4, shift=i) for i in range(6)}
    settings |= {"strategy.fraction-train": 0.5, "strategy.min-nodes": 6, "num-server-rounds": 4}
    ledger = run(settings, files)
    asked = [tuple(record.body["nodes"]) for record in ledger.records("asked")]
    assert all(len(nodes) == 3 for nodes in asked) and len(set(asked)) > 1
