"""Real SuperLinks and SuperNodes; every wait has a limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from deploy.common import processes
from deploy.local.federation import federation
from fedtune_strategies.errors import ConfigError, LinkError, NodesError, PortError

# An app that asks every node for its configuration; each ClientApp leaves a detached process behind.
PROJECT = """
[project]
name = "probe"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "probe:server"
clientapp = "probe:client"
[tool.flwr.app.config]
out = ""
size = 0
hang = false
"""
APP = """
import json, pathlib, subprocess, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    facts = {key: str(value) for key, value in context.node_config.items()}
    return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)


@server.main()
def main(grid, context):
    config = context.run_config
    payload = RecordDict({"payload": ConfigRecord({"bytes": bytes(config["size"])})})
    messages = [Message(payload, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages, timeout=120))
    facts = {reply.metadata.src_node_id: dict(reply.content["facts"]) for reply in replies}
    pathlib.Path(config["out"]).write_text(json.dumps(facts))
    while config["hang"]:
        time.sleep(1)
"""

LAUNCHER = """
import json, signal, sys, time
from pathlib import Path
from deploy.common import processes
from deploy.local.federation import federation
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would have ignored
folder, app = map(Path, sys.argv[1:])
with federation(folder / "state", {"alone": folder / "alone.jsonl"}) as running:
    running.submit(app, {"out": str(folder / "facts.json"), "hang": True})
    print(running.environment[processes.TOKEN], flush=True)
    time.sleep(300)
"""


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "probe.py").write_text(APP)
    return folder


def finished(running, run_id, timeout=150.0):
    deadline = time.monotonic() + timeout
    while not (status := running.status(run_id)).finished:
        running.check()
        assert time.monotonic() < deadline, running.run_log(run_id)
        time.sleep(1.0)
    return status


@pytest.mark.network
@pytest.mark.timeout(600)
def test_a_run_reaches_every_node_and_nothing_stays_behind(app, tmp_path):
    data = {name: tmp_path / f"{name} data.jsonl" for name in ("left", "right")}
    size = 300_000
    with federation(tmp_path / "state", data, threads=3) as running:
        token = running.environment[processes.TOKEN]
        before = running.traffic()
        run_id = running.submit(app, {"out": str(tmp_path / "facts.json"), "size": size})
        status = finished(running, run_id)
        assert status.completed, (status, running.run_log(run_id))
        facts = {int(node): fact for node, fact in json.loads((tmp_path / "facts.json").read_text()).items()}
        expected = {"left": str(data["left"]), "right": str(data["right"])}
        assert {fact["name"]: fact["data"] for fact in facts.values()} == expected
        assert {fact["name"]: node for node, fact in facts.items()} == running.node_ids
        for name, traffic in running.traffic().items():
            grown = traffic - before[name]
            assert size < grown.down < size + 30_000
            assert 2_000 < grown.up < 30_000
        with pytest.raises(ConfigError, match="flwr run failed"):
            running.submit(app, {"no-such-key": 1})
        with pytest.raises(LinkError, match="flwr ls failed"):
            running.status(12345)
        running.nodes["left"].kill()
        running.nodes["left"].wait(10)
        assert running.alive() == ["right"]
        running.check()
        running.nodes["right"].kill()
        running.nodes["right"].wait(10)
        with pytest.raises(NodesError, match="no node is left"):
            running.check()
        assert len(processes.marked(token)) >= 4  # SuperLink, its executor, and what each ClientApp left behind
    assert processes.marked(token) == []


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_launcher_in_the_middle_of_a_run(app, tmp_path, how):
    command = [sys.executable, "-c", LAUNCHER, tmp_path, app]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        token = launcher.stdout.readline().strip()
        assert token, launcher.stderr.read()
        deadline = time.monotonic() + 90
        while not (tmp_path / "facts.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # SuperLink, SuperNode, an executor of each, the ServerApp, and what the ClientApp left behind
        assert len(processes.marked(token)) >= 6
        launcher.send_signal(how)
        launcher.wait(40)
    deadline = time.monotonic() + 20
    while processes.marked(token):
        assert time.monotonic() < deadline, processes.marked(token)
        time.sleep(0.1)


def test_a_fleet_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortError, match=str(port)), federation(tmp_path, {"a": tmp_path / "a"}, fleet_port=port):
            pytest.fail("started on a port in use")
    assert not (tmp_path / "logs" / "superlink.log").exists()


def fake_superlink(folder, monkeypatch, script):
    program = folder / "flower-superlink"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setattr(processes, "environment_path", lambda: f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_superlink_that_ends_while_starting_is_quoted(tmp_path, monkeypatch):
    fake_superlink(tmp_path, monkeypatch, "print('loading'); raise SystemExit('no room on the disk')")
    with pytest.raises(LinkError, match=r"exit code 1; its log .*superlink\.log ends: .*no room on the disk"):  # noqa: SIM117
        with federation(tmp_path / "state", {"a": tmp_path / "a"}):
            pytest.fail("started without a SuperLink")


def test_a_superlink_that_always_finds_its_ports_taken_is_a_port_error(tmp_path, monkeypatch):
    fake_superlink(tmp_path, monkeypatch, "raise SystemExit('[Errno 98] address already in use')")
    with pytest.raises(PortError, match="ports taken 3 times"), federation(tmp_path / "state", {"a": tmp_path / "a"}):
        pytest.fail("started without a SuperLink")


@pytest.mark.parametrize("name", ["superlink", "", "a/b", 'quo"te'])
def test_names_that_cannot_be_a_node_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="choose a plain name"), federation(tmp_path, {name: tmp_path / "a"}):
        pytest.fail("started with an impossible name")


def test_a_federation_without_nodes_is_refused(tmp_path):
    with pytest.raises(NodesError, match="at least one node"), federation(tmp_path, {}):
        pytest.fail("started without nodes")
