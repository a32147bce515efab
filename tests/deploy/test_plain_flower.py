"""The commands of docs/operations.md, as they stand there: Flower's own programs and no launcher of ours."""

import json
import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from flwr.supercore.superexec.dependency_installer import (
    RuntimeDependencyInstallationError,
    install_app_dependencies,
)

from deploy.common import processes
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger

ROOT = Path(__file__).parents[2]
# Only the ports differ from the page, so that the test can run beside other programs.
PORTS = ("8000", "9094", "9095")


def commands():
    page = (ROOT / "docs" / "operations.md").read_text()
    page = page[page.index("## By hand") :]
    ports = dict(zip(PORTS, map(str, distinct_ports(len(PORTS))), strict=True))
    for kind, block in re.findall(r"^```sh( terminal)?\n(.*?)^```$", page, re.M | re.S):
        yield bool(kind), re.sub("|".join(PORTS), lambda found: ports[found.group()], block)


def distinct_ports(count):
    ports = set()
    while len(ports) < count:
        ports.add(processes.free_port())
    return ports


def call(command, environment):
    done = subprocess.run(
        ["sh", "-ec", command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def wait_for(condition, timeout, otherwise):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(1.0)


@pytest.mark.network
@pytest.mark.timeout(600)
def test_the_page_works_as_it_stands(tmp_path):
    (tmp_path / "federation").mkdir()
    (alice, bob), _ = write_federation(tmp_path / "data", 2, train_per_task=8, heldout_per_task=4)
    alice.rename(tmp_path / "federation" / "alice.jsonl")
    bob.rename(tmp_path / "federation" / "bob.jsonl")
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        processes.TOKEN: token,
        "HOME": str(tmp_path),
        "PATH": processes.environment_path(),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    logs = []
    try:
        for terminal, command in commands():
            if terminal:
                logs.append(tmp_path / f"terminal-{len(logs)}.log")
                started = processes.start(["sh", "-ec", f"exec {command}"], environment, logs[-1])
                port = int(re.search(r"--port (\d+)", command).group(1))
                wait_for(
                    lambda port=port, started=started: started.poll() is None and processes.answers(port),
                    60,
                    lambda: processes.tail(logs[-1], 10),
                )
            else:
                shown = call(command, environment)
        assert "Successfully started run" in shown

        def run():
            (only,) = json.loads(call("flwr ls lab --format json", environment))["runs"]
            return only

        def everything():
            return [run(), call(f"flwr log {run()['run-id']} lab --show", environment), *map(processes.tail, logs)]

        wait_for(lambda: run()["status"].startswith("finished"), 150, everything)
        assert run()["status"] == "finished:completed", everything()
    finally:
        processes.sweep(token)
    ledger = Ledger.read(tmp_path / "federation" / "run")
    assert {record.node for record in ledger.records("reply")} == {"alice", "bob"}
    assert (tmp_path / "federation" / "run" / "model" / "model.safetensors").exists()
    ledger.close()


def test_flower_s_simulation_engine_is_refused_before_anything_is_installed(tmp_path, monkeypatch):
    """`flwr run .` without a connection; Flower's own step that installs what the project file names."""
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setenv("UV_OFFLINE", "1")  # should it not be refused, nothing is fetched
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    with pytest.raises(RuntimeDependencyInstallationError, match="name-a-connection-or-use-fedtune-demo"):
        install_app_dependencies(tmp_path)
    assert not list((tmp_path / "flower").rglob("site-packages"))
    assert (ROOT / "docs" / "operations.md").read_text().count("name-a-connection-or-use-fedtune-demo") == 1
