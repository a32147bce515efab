"""Processes killed with -9 in the middle of a run over a real network, and the same model in the end."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from deploy.common import processes
from deploy.common.certificates import node_key
from deploy.flower import versions
from deploy.operator.members import admit
from deploy.operator.runs import tune
from deploy.operator.serve import serving
from fedtune_strategies.errors import LedgerError
from server_app.ledger import Ledger
from server_app.run_view import RunView
from tests.federations import final_state, run

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(1800)]

PATIENCE = 600.0


class Lab:
    """A server as `fedtune serve` runs it, with nodes that are started again whenever they end."""

    def __init__(self, stack, folder, data_files):
        self.events = []
        port = processes.free_port()
        serve = serving(folder, address=f"localhost:{port}", listen="127.0.0.1", on_event=self.events.append)
        self.server = stack.enter_context(serve)
        self.folder, self.port, self.data_files = folder, port, data_files
        control = self.server.control
        for name in data_files:
            key = node_key(folder / "keys", name).public
            secret, _ = self.server.members.invite(name, 60)
            member = self.server.members.apply(secret, key.read_text().strip(), approval=False)
            admit(self.server.members, member, lambda _, name, key=key: control.register(key, name), control.unregister)
        self.nodes = {name: self._start(name) for name in data_files}
        self._done = threading.Event()
        keeper = threading.Thread(target=self._keep)
        keeper.start()
        stack.callback(keeper.join)
        stack.callback(self._done.set)

    def _start(self, name):
        command = [
            "flower-supernode", *versions.SUPERNODE, "--superlink", f"localhost:{self.port}",
            "--root-certificates", str(self.server.authority), "--host", "127.0.0.1",
            "--auth-supernode-private-key", str(node_key(self.folder / "keys", name).private),
            "--node-config", f'name="{name}" data="{self.data_files[name]}" draw-key="public"',
            "--port", str(processes.free_port()),
        ]  # fmt: skip
        environment = self.server.control.environment | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        environment["FEDTUNE_HOME"] = str(self.folder / "home")
        return processes.start(command, environment, self.folder / "logs" / f"{name}.log")

    def _keep(self):
        while not self._done.wait(1.0):
            self.server.watch()
            for name, process in self.nodes.items():
                if process.poll() is not None:
                    self.nodes[name] = self._start(name)

    def find(self, word, *, below=None):
        """Processes of this lab whose command has a word, perhaps only those below another."""
        token = self.server.control.environment[processes.TOKEN]
        found = []
        for process in psutil.Process(below).children(recursive=True) if below else psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(word in part for part in process.cmdline()) and process.environ().get(processes.TOKEN) == token:
                    found.append(process)
        return found

    def worker(self, name):
        host = str(self.nodes[name].pid)
        return [one for one in self.find("client_app.worker") if one.cmdline()[-1] == host]


def wait_for(condition, what):
    limit = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < limit, what
        time.sleep(0.1)
    return found


def records(folder, kind, round=None):
    with contextlib.suppress(LedgerError):
        ledger = Ledger.read(folder)
        found = list(ledger.records(kind, round=round))
        ledger.close()
        return found
    return []


def kill(found):
    os.kill(found[0].pid, signal.SIGKILL)


def test_whatever_is_killed_the_run_ends_in_the_same_model(settings, data_files, tmp_path):
    with contextlib.ExitStack() as stack:
        lab = Lab(stack, tmp_path / "server", data_files)
        settings |= {"strategy.min-replies": 3, "train.local-steps": 40, "eval.data": "", "round.deadline": 120.0}
        # By Flower's messages, which leave time to kill: tests/stream has the faults of streams.
        settings |= {"stream.listen": "off"}
        _seeds(lab, settings | {"num-server-rounds": 3}, data_files, tmp_path)
        blocks = settings | {"method.name": "fedcybgd", "num-server-rounds": 3, "strategy.min-replies": 1}
        _blocks(lab, blocks, data_files, tmp_path)


def _seeds(lab, settings, data_files, tmp_path):
    """In one round a worker, a ClientApp and a SuperNode; then the SuperLink; then the ServerApp."""
    with _tuned(lab, settings, data_files, tmp_path) as folder:
        wait_for(lambda: records(folder, "asked", round=1), "round 1 did not begin")
        kill(wait_for(lambda: lab.worker("node-0"), "no worker"))
        kill(wait_for(lambda: lab.find("flwr-clientapp", below=lab.nodes["node-1"].pid), "no ClientApp"))
        lab.nodes["node-2"].kill()
        wait_for(lambda: records(folder, "asked", round=2), "round 1 did not end")
        kill(lab.find("deploy.flower.superlink"))
        wait_for(lambda: records(folder, "asked", round=3), "round 2 did not end")
        kill(wait_for(lambda: lab.find("deploy.flower.task"), "no ServerApp"))
    assert len(records(folder, "start")) == 2, "the run was submitted again once"
    assert any("superlink ended" in line for line in lab.events)


def _blocks(lab, settings, data_files, tmp_path):
    """The worker of the node in turn, then the ServerApp."""
    with _tuned(lab, settings, data_files, tmp_path) as folder:
        (asked,) = wait_for(lambda: records(folder, "asked", round=1), "turn 1 did not begin")
        kill(wait_for(lambda: lab.worker(next(iter(asked.body["nodes"]))), "no worker"))
        wait_for(lambda: records(folder, "asked", round=2), "turn 1 did not end")
        kill(wait_for(lambda: lab.find("deploy.flower.task"), "no ServerApp"))


@contextlib.contextmanager
def _tuned(lab, settings, data_files, tmp_path):
    """Tune in a thread while the block goes on; afterwards the model must be that of an undisturbed run in memory."""
    method = settings.get("method.name", "fedkseed")
    memory, network = (settings | {"run.dir": str(tmp_path / f"{kind}-{method}")} for kind in ("memory", "network"))
    run(memory, data_files)
    result = []
    tuner = threading.Thread(
        target=lambda: result.append(
            tune(lab.server.control, network, RunView(Path(network["run.dir"])), lambda view: None, lab.events.append)
        )
    )
    tuner.start()
    yield Path(network["run.dir"])
    tuner.join(PATIENCE)
    assert result, lab.events
    assert final_state(network) == final_state(memory)
    replies = [(one.round, one.node) for one in records(Path(network["run.dir"]), "reply")]
    assert len(replies) == len(set(replies))
