"""From zero to a tuned model on four machines, by the commands of the guides as they stand there.

The machines are network namespaces; the third node is behind a slow, lossy link with address translation.
"""

import json
import re
import secrets
import time
from pathlib import Path

import psutil
import pytest

from deploy.common import processes
from deploy.common.join_token import decode_token
from fedtune_strategies.language.model_files import model_folder
from fedtune_strategies.tiny.tasks import write_federation
from tests.deploy.machines import SERVER, Machines, available

DOCS = Path(__file__).parents[2] / "docs"
NODES = ["alice", "bob", "carol"]
ADDRESS = f"{SERVER}:9092"

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(available()), reason=available() or "namespaces are there"),
]


def commands(page, kind):
    """The commands of one kind in a guide, with the address of this test's server."""
    blocks = re.findall(rf"^```sh {kind}\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    return [block.replace("\\\n", " ").strip().replace("my.server.example:9092", ADDRESS) for block in blocks]


def wait_for(condition, timeout, otherwise):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.5)
    return found


@pytest.fixture
def machines(tmp_path):
    files, held_out = write_federation(tmp_path / "data", 3, train_per_task=8, heldout_per_task=2)
    token = secrets.token_hex(16)
    with Machines(tmp_path, NODES, token) as machines:
        for name, file in zip(NODES, files, strict=True):
            file.rename(tmp_path / name / "notes.jsonl")
        held_out.rename(tmp_path / "server" / "held_out.jsonl")
        try:
            yield machines
        finally:
            processes.sweep(token)


def logs(machines):
    return lambda: {file.name: processes.tail(file, 12) for file in sorted(machines.folder.glob("*.log"))}


def test_from_zero_to_a_tuned_model(machines):
    (serve,), (run,) = commands("guide-operator.md", "terminal"), commands("guide-operator.md", "operator")
    (join,), (doctor, leave) = commands("guide-device-owner.md", "terminal"), commands("guide-device-owner.md", "owner")
    assert len([serve, run, *NODES]) <= 5  # commands until the first round
    show, home = logs(machines), machines.folder / "server"

    server = machines.start("server", serve, "serve.log")
    printed = machines.folder / "serve.log"
    tokens = wait_for(
        lambda: found if len(found := re.findall(r"fedtune1-\S+", printed.read_text())) == 3 else [], 300, show
    )
    owners = {}
    for token in tokens:
        name = decode_token(token).name
        (machines.folder / name / "token.txt").write_text(token + "\n")
        line = join + " --yes" + (" --model server" if name == "alice" else "")
        owners[name] = machines.start(name, line, f"join-{name}.log")
    wait_for(
        lambda: all("connected" in (machines.folder / f"join-{name}.log").read_text() for name in NODES), 300, show
    )

    # A task that the killed SuperLink had handed out and not heard of again costs its round a deadline.
    tuning = machines.start("server", run + " --set round.deadline=150", "run.log")
    told = machines.folder / "run.log"
    wait_for(lambda: tuning.poll() is not None or "round 1/2: 3 of 3 replies" in told.read_text(), 300, show)
    assert tuning.poll() is None, show()
    # The SuperLink dies in the middle of the run: it is started again, and the run goes on as if nothing was.
    (superlink,) = [one for one in psutil.Process(server.pid).children() if "deploy.flower.superlink" in one.cmdline()]
    superlink.kill()
    assert tuning.wait(400) == 0, show()
    assert "superlink ended with code -9, starting it again" in printed.read_text()

    code, out, _ = machines.call("server", "fedtune status --format json")
    report = json.loads(out)
    assert code == 0 and report["run"]["state"] == "finished" and report["run"]["round"] == 2
    # Who is back within Flower's patience of a minute answers in the second round too.
    assert {node["name"] for node in report["nodes"]} == set(NODES) and report["totals"]["replies"] >= 4, show()
    # All of them over their streams, the one behind the bad link too.
    assert {node["way"] for node in report["nodes"]} == {"stream"}, show()
    assert (Path(report["run"]["exported"]) / "model.safetensors").exists()
    assert "held-out loss" in machines.call("server", "fedtune status")[1]
    # To the one who asked for it the base model came over the wire, whole, and to nobody else.
    (received,) = machines.folder.glob("*/.fedtune/models/*/model.safetensors")
    assert received.is_relative_to(machines.folder / "alice")
    assert received.read_bytes() == (model_folder("fedtune-tiny") / "model.safetensors").read_bytes()

    check_what_is_open(machines, json.loads((home / ".fedtune/server/serve.json").read_text()))
    check_no_secret_was_written(machines.folder, tokens)
    code, out, errors = machines.call("carol", doctor)
    assert code == 0 and "✗" not in out, out + errors
    assert machines.call("bob", leave)[0] == 0 and not list((machines.folder / "bob/.fedtune/nodes").iterdir())
    wait_for(lambda: states(machines) == {"alice": "online", "bob": "left", "carol": "online"}, 300, show)
    # A token works once: not for a stranger who found it.
    (machines.folder / "bob" / "token.txt").write_text(tokens[0])
    code, _, errors = machines.call("bob", join + " --yes")
    assert code == 18 and "used already" in errors

    programs = psutil.Process(server.pid).children(recursive=True)
    for process in (server, *owners.values()):
        process.terminate()
    for process in (server, *owners.values()):
        process.wait(120)
    assert not [one for one in programs if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def states(machines):
    return {
        node["name"]: node["state"] for node in json.loads(machines.call("server", "fedtune nodes --format json")[1])
    }


def check_what_is_open(machines, facts):
    """From another machine the published port answers, and neither control nor runtime interface does."""
    probe = "python -c 'import socket, sys; sys.exit(socket.socket().connect_ex((sys.argv[1], int(sys.argv[2]))))' "
    assert machines.call("alice", f"{probe} {SERVER} 9092")[0] == 0
    assert machines.call("alice", f"{probe} {SERVER} {facts['control']}")[0] != 0


def check_no_secret_was_written(folder, tokens):
    """Tokens stand where `serve` printed them and where their owners saved them, and nowhere else."""
    words = [word.encode() for token in tokens for word in (token, decode_token(token).secret.hex())]
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in ("serve.log", "token.txt"):
            content = file.read_bytes()
            assert not any(word in content for word in words), file
