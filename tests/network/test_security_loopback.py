"""What another account of the same machine tries through loopback, and what a hostile operator submits to nodes.

Server and node are the commands of the guides; the attacker is a process of another user id.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flwr.cli.build import build_fab_from_disk

from deploy.common import processes
from tests.conftest import write_rows

NOBODY = 65534
FLWR = str(Path(sys.executable).parent / "flwr")

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="a second user id needs root"),
]

PROJECT = """
[project]
name = "{name}"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"
[tool.flwr.app.config]
out = ""
"""
# Leaves a file where it runs, and asks every node to.
CODE = """
import pathlib
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ClientApp()
server = ServerApp()


@app.train()
def train(message, context):
    pathlib.Path(message.content["c"]["out"] + ".client").write_text("ran")
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    pathlib.Path(context.run_config["out"]).write_text("ran")
    content = RecordDict({"c": ConfigRecord({"out": context.run_config["out"]})})
    messages = [Message(content, node, "train") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=60)
    pathlib.Path(context.run_config["out"]).write_text(str([reply.error.reason for reply in replies]))
"""
# Another account: it submits a run at a control interface, and asks a runtime interface for a task, as a second
# executor would. It gives up its rights once all is imported, as the interpreter may lie where others cannot enter.
ATTACK = """
import os, sys
from pathlib import Path
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
import httpx, psutil

port, app, user = sys.argv[1:]
start = StartRunRequest(fab=Fab(hash_str="x", content=Path(app).read_bytes()))
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))


def attempt(name, kind, call):
    version = RuntimeVersionHttpInterceptor(component_name=name)
    client = kind(f"https://127.0.0.1:{port}", verify=False, interceptors=[version])
    try:
        print("GOT IN", call(client))
    except httpx.HTTPStatusError as error:
        print(error.response.status_code)


attempt("flwr CLI", ControlHttpClient, lambda one: one.ListRuns(ListRunsRequest()))
attempt("flwr CLI", ControlHttpClient, lambda one: one.StartRun(start))
kinds = ["flwr-clientapp", "flwr-serverapp"]
attempt("SuperExec", RuntimeHttpClient, lambda one: one.AcquireTask(AcquireTaskRequest(supported_task_types=kinds)))
"""


def attack(port, app):
    """What another account is answered: by the control interface twice, and by the runtime interface."""
    command = [sys.executable, "-P", "-c", ATTACK, str(port), str(app), str(NOBODY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def write_app(folder, name="probe", server="probe:server", client="probe:app"):
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name, server=server, client=client))
    (folder / "probe.py").write_text(CODE)
    return folder


def flwr(home, *arguments):
    """Call ``flwr`` as the operator."""
    environment = {**os.environ, "FLWR_HOME": str(home / "server/flower"), "PATH": processes.environment_path()}
    command = [FLWR, *map(str, arguments), "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    answer = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{"))[0]
    assert answer["success"], answer
    return answer


def finished(home, run):
    limit = time.monotonic() + 120
    while True:
        (found,) = flwr(home, "ls", "fedtune", "--run-id", run)["runs"]
        if found["status"].startswith("finished"):
            return found
        assert time.monotonic() < limit
        time.sleep(0.5)


def wait_for(condition, otherwise):
    limit = time.monotonic() + 180
    while not (found := condition()):
        assert time.monotonic() < limit, otherwise()
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server and a node, each under its own home, as their commands make them."""
    folder, token = tmp_path_factory.mktemp("lab"), os.urandom(8).hex()
    port = processes.free_port()
    environment = {**os.environ, processes.TOKEN: token, "OMP_NUM_THREADS": "1"}
    fedtune = [sys.executable, "-P", "-m", "deploy.cli"]
    data = write_rows(folder / "notes.jsonl", 8)
    try:
        operator, owner = folder / "operator", folder / "owner"
        serve = [*fedtune, "serve", "--address", f"localhost:{port}", "--listen", "127.0.0.1", "--node", "alice"]
        processes.start(
            [*serve, "--format", "json"], environment | {"FEDTUNE_HOME": str(operator)}, folder / "serve.log"
        )
        said = folder / "serve.log"
        wait_for(lambda: "serving" in said.read_text(), said.read_text)
        facts = json.JSONDecoder().raw_decode(said.read_text(), said.read_text().index("{"))[0]
        joined = environment | {"FEDTUNE_HOME": str(owner), "FEDTUNE_TOKEN": facts["tokens"]["alice"]}
        processes.start([*fedtune, "join", "--data", str(data), "--yes"], joined, folder / "join.log")
        log = folder / "join.log"
        wait_for(lambda: "connected" in log.read_text(), log.read_text)
        yield folder, operator, owner, environment
    finally:
        processes.sweep(token)


def command_of(*words):
    """The process whose command has all these words, and its command."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if all(word in " ".join(command) for word in words):
                return process, command
    raise AssertionError(words)


def test_another_account_of_the_operators_machine_submits_nothing_and_takes_no_task(lab, tmp_path):
    control = json.loads((lab[1] / "server/serve.json").read_text())["control"]
    bundle = tmp_path / "probe.fab"
    bundle.write_bytes(build_fab_from_disk(write_app(tmp_path / "probe")))
    assert attack(control, bundle) == ["401", "401", "401"]
    assert flwr(lab[1], "ls", "fedtune")["runs"] == []


def test_another_account_of_a_nodes_machine_takes_no_task(lab, tmp_path):
    _, command = command_of("deploy.flower.supernode", str(lab[2]))
    port = command[command.index("--port") + 1]
    assert attack(port, write_app(tmp_path / "probe") / "pyproject.toml") == ["404", "404", "401"]


def test_the_server_runs_no_app_but_its_own(lab, tmp_path):
    out = tmp_path / "ran"
    ours = {"name": "fedtune", "server": "server_app.app:app", "client": "client_app.app:app"}
    for number, given in enumerate([{}, ours]):
        app = write_app(tmp_path / f"app-{number}", **given)
        run = flwr(lab[1], "run", app, "fedtune", "--run-config", f'out="{out}"')["run-id"]
        found = finished(lab[1], run)
        assert found["status"] == "finished:failed" and "carries 'probe.py'" in found["status-details"], found
    assert not out.exists() and not [*(lab[1] / "server").rglob("probe.py")]


def test_what_is_written_is_its_owners_alone(lab):
    for home in lab[1:3]:
        paths = [home, *home.rglob("*")]
        assert len(paths) > 10
        assert not [path for path in paths if not path.is_symlink() and path.stat().st_mode & 0o077]


def test_a_node_runs_no_app_but_its_own_even_for_a_hostile_operator(lab, tmp_path):
    """The operator replaces our executor by Flower's, whose ServerApp runs, and reaches the node."""
    folder, operator, _, environment = lab
    ours, command = command_of("deploy.flower.executor", str(operator))
    plain = ["flower-superexec", *command[command.index("deploy.flower.executor") + 1 :]]
    plain[plain.index("--parent-pid") + 1] = str(os.getpid())
    ours.suspend()
    theirs = processes.start(
        plain,
        environment | {"PATH": processes.environment_path(), "FLWR_HOME": str(operator / "server/flower")},
        folder / "plain.log",
    )
    try:
        out = tmp_path / "ran"
        app = write_app(tmp_path / "app")
        run = flwr(operator, "run", app, "fedtune", "--run-config", f'out="{out}"')["run-id"]
        assert finished(operator, run)["status"] == "finished:completed"
        assert "carries 'probe.py'" in out.read_text()
        assert not out.with_suffix(".client").exists() and not [*lab[2].rglob("probe.py")]
        said = (folder / "join.log").read_text()
        assert "refused an app bundle that carries 'probe.py'" in said, said
    finally:
        processes.stop([theirs])
        ours.resume()
