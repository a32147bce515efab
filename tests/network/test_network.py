"""Runs over real SuperLink and SuperNode processes, with TLS and node keys."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from deploy.local.federation import federation
from fedtune_strategies.errors import ModelError
from server_app.ledger import Ledger
from tests.federations import final_state, run

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

RUN_SECONDS = 240


def follow(running, run_id, folder):
    """Wait until a run has ended; returns the run's status."""
    limit = time.monotonic() + RUN_SECONDS
    while time.monotonic() < limit:
        ledger = Ledger.read(folder) if (folder / "ledger.head").exists() else None
        # Asking Flower costs a second of a core, reading the ledger nothing.
        if ledger and (ledger.last("finished") or ledger.last("failed")):
            while not (status := running.status(run_id)).finished:
                assert time.monotonic() < limit
            return status
        time.sleep(0.5)
    pytest.fail(f"the run did not end within {RUN_SECONDS} s:\n{running.run_log(run_id)[-3000:]}")


def submit(running, settings):
    return running.submit(Path(__file__).parents[2], settings)


def workers(running):
    """Workers of a federation's nodes: the last word of their command is their SuperNode's process id."""
    joined = [psutil.Process(process.pid) for process in running.nodes.values() if process.poll() is None]
    hosts = {str(child.pid) for process in joined for child in process.children()}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if "client_app.worker" in command and command[-1] in hosts:
            found.append(process)
    return found


def check_each_line_stands_once(running, run_id):
    """In the run's log and in a node's: as JSON, and in no other form beside it."""
    told = running.run_log(run_id)
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert sorted(line["node"] for line in lines if " joined with " in line["message"]) == sorted(running.nodes)
    assert told.count(" joined with ") == len(running.nodes) and told.count("held-out loss") == 4
    assert running.log("node-0").read_text(errors="replace").count("examples, model") == 1


def bytes_of_rounds(running, settings):
    """Run; yields, from each committed round to the next, the seconds and the bytes of every node's connection."""
    folder, marks = Path(settings["run.dir"]), {}
    run_id = submit(running, settings)
    limit = time.monotonic() + RUN_SECONDS
    while settings["num-server-rounds"] not in marks:
        assert time.monotonic() < limit, running.run_log(run_id)
        last = Ledger.read(folder).last("round") if (folder / "ledger.head").exists() else None
        if last and last.round not in marks:
            marks[last.round] = time.monotonic(), running.traffic()
        time.sleep(0.1)
    for (start, before), (end, after) in pairwise(marks.values()):
        sent = [after[node] - before[node] for node in after]
        yield end - start, [one.up + one.down for one in sent]


def test_all_that_a_connection_carries_in_a_warm_round(settings, data_files, tmp_path):
    """Payload, framework, TLS and polls, at the paper's K and number of steps."""
    paper = {"method.name": "fedkseed-pro", "fedkseed.seeds": 4096, "train.local-steps": 200, "eval.answers": 0}
    settings |= paper | {"num-server-rounds": 4, "strategy.min-nodes": 2}
    nodes = {name: data_files[name] for name in ("node-0", "node-1")}
    with federation(tmp_path / "federation", nodes) as running:
        rounds = list(bytes_of_rounds(running, settings))
    # Beside its stream a SuperNode asks for messages and shows that it is alive, each every half a minute.
    spent = [max(sizes) - 90 * seconds for seconds, sizes in rounds]
    assert max(spent) < 12_000, rounds
    assert min(spent) < 6_000, rounds


def test_a_networked_run_equals_the_in_memory_one(settings, data_files, tmp_path, monkeypatch):
    """FedKSeed-Pro (test_faults has the others); its log; a SuperNode killed with -9; a run that cannot start."""
    monkeypatch.setenv("FEDTUNE_LOG", "json")
    with federation(tmp_path / "federation", data_files) as running:
        memory = settings | {"method.name": "fedkseed-pro", "run.dir": str(tmp_path / "memory")}
        network = memory | {"run.dir": str(tmp_path / "network")}
        run(memory, data_files)
        run_id = submit(running, network)
        status = follow(running, run_id, Path(network["run.dir"]))
        assert status.completed, running.run_log(run_id)
        assert final_state(network) == final_state(memory)
        # The model was loaded once: one worker for each node.
        assert len(workers(running)) == 3
        check_each_line_stands_once(running, run_id)

        # A user's mistake fails the run with one line, no trace.
        broken = settings | {"model.name": str(tmp_path / "nothing"), "run.dir": str(tmp_path / "broken")}
        run_id = submit(running, broken)
        status = follow(running, run_id, Path(broken["run.dir"]))
        assert not status.completed and "nothing" in status.details
        assert "Traceback" not in running.run_log(run_id)
        assert Ledger.read(tmp_path / "broken").last("failed").body["exit_code"] == ModelError.exit_code

        # No orphan after kill -9 of a SuperNode.
        mine = workers(running)
        os.kill(running.nodes["node-0"].pid, signal.SIGKILL)
        limit = time.monotonic() + 20
        while sum(process.is_running() for process in mine) > 2:
            assert time.monotonic() < limit, "the worker outlived its SuperNode"
            time.sleep(0.2)
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive
