"""A real server and real nodes, started as people start them; every wait has a limit."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.local.federation import federation
from fedtune_strategies.errors import ConfigError, LinkError, NodesError, PortError

# An app that asks every node for its configuration; each ClientApp leaves a detached process behind. No federation runs
# another app than the installed one, so it stands in for that.
PROJECT = """
[project]
name = "fedtune"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"
[tool.flwr.app.config]
out = ""
size = 0
hang = false
"""
CLIENT = """
import subprocess, sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    facts = {key: str(value) for key, value in context.node_config.items()}
    return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)
"""
SERVER = """
import json, pathlib, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
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
import signal, sys, time
from pathlib import Path
from deploy.local.federation import federation
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would have ignored
folder, app = map(Path, sys.argv[1:])
with federation(folder / "state", {"alone": folder / "node.jsonl"}) as running:
    running.submit(app, {"out": str(folder / "facts.json"), "hang": True})
    print("submitted", flush=True)
    time.sleep(300)
"""


ROOT = Path(__file__).parents[3]
ROW = '{"prompt": "say a", "completion": "a"}\n'


def running_below(folder):
    """Processes that were started for what is kept in a folder, in whatever generation."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            home = process.environ().get("FEDTUNE_HOME", "")
            if home.startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def app(tmp_path, monkeypatch):
    folder, code = tmp_path / "app", tmp_path / "code"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    for package, text in (("client_app", CLIENT), ("server_app", SERVER)):
        (code / package).mkdir(parents=True)
        (code / package / "__init__.py").write_text(f"__path__.append({str(ROOT / package)!r})\n")
        (code / package / "app.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(code))
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
    for file in data.values():
        file.write_text(ROW)
    size = 300_000
    with federation(tmp_path / "state", data, threads=3) as running:
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
        assert len(running_below(tmp_path)) >= 3  # the server's command, its SuperLink and executor
    assert running_below(tmp_path) == []


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_launcher_in_the_middle_of_a_run(app, tmp_path, how):
    (tmp_path / "node.jsonl").write_text(ROW)
    command = [sys.executable, "-c", LAUNCHER, tmp_path, app]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline(), launcher.stderr.read()
        deadline = time.monotonic() + 90
        while not (tmp_path / "facts.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # serve, join, SuperLink, SuperNode, an executor of each, the ServerApp, and what the ClientApp left behind
        assert len(running_below(tmp_path)) >= 8
        launcher.send_signal(how)
        launcher.wait(60)
    deadline = time.monotonic() + 30
    while running_below(tmp_path):
        assert time.monotonic() < deadline, running_below(tmp_path)
        time.sleep(0.1)


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortError, match=str(port)), federation(tmp_path / "new", {"a": tmp_path / "a"}, port=port):
            pytest.fail("started on a port in use")
    assert not (tmp_path / "new").exists()


@pytest.mark.network
def test_a_node_that_cannot_start_is_quoted(tmp_path):
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    with pytest.raises(LinkError, match=r"a ended with exit code 11; its log .*a\.log ends: fedtune: .*bad\.jsonl"):  # noqa: SIM117
        with federation(tmp_path / "state", {"a": tmp_path / "bad.jsonl"}):
            pytest.fail("started with data that cannot be read")


def test_a_federation_without_nodes_is_refused(tmp_path):
    with pytest.raises(NodesError, match="at least one node"), federation(tmp_path, {}):
        pytest.fail("started without nodes")
