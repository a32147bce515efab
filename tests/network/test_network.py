"""Runs over real SuperLink and SuperNode processes, with TLS and node keys."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from deploy.federation import federation
from fedtune_strategies.errors import ModelError
from server_app.ledger import Ledger
from tests.federations import final_state, run

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

RUN_SECONDS = 240


def follow(running, run_id, folder):
    """Wait until a run has ended; returns the run's status."""
    limit = time.monotonic() + RUN_SECONDS
    while time.monotonic() < limit:
        ledger = Ledger.read(folder) if (folder / "ledger.sqlite").exists() else None
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
    hosts = {str(process.pid) for process in running.nodes.values()}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if "client_app.worker" in command and command[-1] in hosts:
            found.append(process)
    return found


def test_networked_runs_equal_the_in_memory_ones(settings, data_files, tmp_path):
    """Every method, one federation; then a SuperNode killed with -9 and a run that cannot start."""
    with federation(tmp_path / "federation", data_files) as running:
        for method in ("fedkseed", "fedkseed-pro", "fedcybgd"):
            memory = settings | {"method.name": method, "run.dir": str(tmp_path / f"memory-{method}")}
            network = memory | {"run.dir": str(tmp_path / f"network-{method}")}
            run(memory, data_files)
            run_id = submit(running, network)
            status = follow(running, run_id, Path(network["run.dir"]))
            assert status.completed, running.run_log(run_id)
            assert final_state(network) == final_state(memory)
            # The model was loaded once: one worker for each node.
            assert len(workers(running)) == 3

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
