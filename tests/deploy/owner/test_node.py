"""A device owner's commands: what they check, say, write and run; the federation itself is in test_machines."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time

import pytest
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from deploy.cli import app
from deploy.common import processes
from deploy.common.join_token import JoinToken
from deploy.owner.consent import ALWAYS, base_model, leaves, terms
from deploy.owner.doctor import examine
from deploy.owner.join import Membership, memberships
from deploy.owner.node import meanings, node_config_words, run_node
from deploy.owner.service import install, remove, unit_file, unit_text
from fedtune_strategies.config.node import NodeConfig, parse_node
from fedtune_strategies.errors import ConfigError, DataError, LinkError, ProtocolError, ResourceError
from fedtune_strategies.method import installed_methods


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FEDTUNE_TOKEN", raising=False)
    return tmp_path


@pytest.fixture
def membership(tmp_path):
    mine = Membership("alice", "server.example:9092", str(tmp_path / "my notes.jsonl"))
    mine.save()
    return mine


def call(*arguments, text=None):
    result = CliRunner().invoke(app, list(arguments), input=text)
    return result.exit_code, result.stdout, result.stderr


def test_doctor_names_the_first_bad_line_and_exits_with_its_code(tmp_path):
    data = tmp_path / "notes.jsonl"
    data.write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": 3}\n')
    code, out, _ = call("doctor", "--data", str(data), "--format", "json")
    (bad,) = [one for one in json.loads(out) if one["ok"] is False]
    assert code == DataError.exit_code and bad["label"] == "data" and "3" in bad["detail"]
    data.write_text('{"text": "fine"}\n')
    code, out, _ = call("doctor", "--data", str(data))
    assert code == 0 and "✓ data" in out and "1 example" in out and "✗" not in out


def test_doctor_tells_a_silent_port_from_a_wrong_name():
    found = {one.label: one for one in examine(f"127.0.0.1:{processes.free_port()}", None, NodeConfig())}
    assert found["address"].ok is False and "is the server running" in found["address"].detail
    assert "certificate" not in found
    found = {one.label: one for one in examine("no-such-host.invalid:9092", None, NodeConfig())}
    assert "no machine is called no-such-host.invalid" in found["address"].detail


@pytest.mark.parametrize(("what", "label"), [("memory", "memory"), ("disk", "disk")])
def test_doctor_sees_what_is_scarce(monkeypatch, what, label):
    monkeypatch.setattr(f"deploy.owner.doctor.LEAST_{what.upper()}", 1 << 62)
    found = {one.label: one for one in examine("", None, NodeConfig())}
    assert found[label].ok is False and found[label].exit_code == ResourceError.exit_code


def test_joining_refuses_before_it_connects(tmp_path):
    old = JoinToken("127.0.0.1:1", "alice", bytes(32), bytes(16), int(time.time()) - 60).encode()
    for arguments, text, error, line in [
        ((), None, ConfigError, "has joined no such federation"),
        (("x",), None, ConfigError, "--data is missing"),
        (("x", "--data", "notes"), None, LinkError, "no join token"),
        ((old, "--data", "notes"), None, LinkError, "expired"),
        (("-", "--data", "notes"), old + "\n", LinkError, "expired"),
    ]:
        code, _, shown = call("join", *arguments, text=text)
        assert code == error.exit_code and line in shown and shown.count("\n") == 1 and old not in shown


def test_owners_are_told_what_leaves_by_the_method():
    assert leaves({"settings": {"method.name": "fedkseed", "train.local-steps": 7}})[0].startswith(
        "fedkseed, every round: 7"
    )
    told = leaves({})  # nothing announced: any installed method may come
    assert [line.partition(",")[0] for line in told[: -len(ALWAYS)]] == list(installed_methods())
    assert any("all parameters of the model" in line for line in told)
    assert "unknown here" in leaves({"settings": {"method.name": "mine"}})[0]
    plan = {"memory": 1 << 60, "disk": 10**6, "up": 1000, "down": 2000, "tasks": 1.0}
    rows = dict(terms({"settings": {"method.name": "fedkseed"}, "plan": plan}))
    assert "NOT ENOUGH" in rows["memory"] and rows["each round"].startswith("1.0 kB up and 2.0 kB down")


def test_the_model_is_found_here_or_comes_from_the_server(membership):
    assert "here in" in base_model(membership, {"settings": {"model.name": "fedtune-tiny"}})
    assert "comes from the server, once" in base_model(membership, {"settings": {"model.name": "/no/such/model"}})
    assert "where it is not here" in base_model(membership, {})
    # What nobody named is left to each run: a model that lies here is not fetched.
    assert 'model="' not in node_config_words(membership)
    assert base_model(Membership("a", "b:1", "c", model="/mine"), {}) == "/mine"
    assert "comes from the server" in base_model(Membership("a", "b:1", "c", model="server"), {})
    found = {one.label: one for one in examine("", None, NodeConfig(model="server"))}
    assert found["model"].ok and "comes from the server" in found["model"].detail


def test_the_log_of_a_supernode_is_told_in_plain_words():
    log = (
        "INFO :      SuperNode ID: 123\nWARNING :   Connection attempt failed, retrying in 5.22 seconds\n"
        "INFO :      Connection successful after 38.82 seconds and 8 tries.\nINFO :      Sent successfully\nINFO : x\n"
    )
    assert meanings(log) == [
        "connected",
        "the server cannot be reached; trying again",
        "connected again",
        "answered a task",
    ]


def test_a_node_s_other_keys_reach_flower_and_are_checked_before_joining(tmp_path):
    settings = {"columns": "prompt=question,completion=answer", "skip-bad": True, "micro-batch": 4}
    mine = Membership("alice", "b:1", str(tmp_path / "my notes.csv"), settings=settings)
    mine.save()
    assert memberships() == [mine]
    given = parse_config_args([node_config_words(mine)])
    assert parse_node(given) == mine.node_config()
    assert mine.node_config().columns == settings["columns"] and mine.node_config().skip_bad is True
    for wrong, line in [
        ({"skip-bda": 1}, "skip-bad"),
        ({"micro-batch": -1}, "micro-batch"),
        ({"data": "x"}, "--set data"),
    ]:
        with pytest.raises(ConfigError, match=line):
            Membership("alice", "b:1", "/data", settings=wrong).node_config()


def test_a_start_without_a_token_takes_no_other_settings(membership):
    for option, value in [
        ("--data", "/other.jsonl"),
        ("--columns", "text=note"),
        ("--set", "micro-batch=4"),
        ("--device", "cuda"),
    ]:
        code, _, error = call("join", option, value)
        assert code == ConfigError.exit_code and "alice starts as it joined" in error


def test_doctor_reads_data_as_the_node_would(tmp_path):
    data = tmp_path / "notes.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": 3}\n')
    columns = ("--columns", "prompt=question,completion=answer")
    code, out, _ = call("doctor", "--data", str(data), *columns)
    assert code == DataError.exit_code and "line 2" in out and "skip-bad=true" in out
    code, out, _ = call("doctor", "--data", str(data), *columns, "--set", "skip-bad=true")
    assert code == 0 and "1 example, bad rows left out" in " ".join(out.split())


def test_a_path_that_flower_cannot_take_is_refused():
    with pytest.raises(ConfigError, match="quote"):
        node_config_words(Membership("a", "b:1", '/x/a"b.jsonl'))


def test_a_supernode_that_ends_is_started_again_and_again(membership, monkeypatch, tmp_path):
    """And nothing stays behind when its owner stops it."""
    program = tmp_path / "bin" / "flower-supernode"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nprint('SuperNode ID: 7')\nraise SystemExit(1)\n")
    program.chmod(0o755)
    monkeypatch.setattr(processes, "environment_path", lambda: f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(processes, "next_pause", lambda pause, lived: 0.0)
    said = []

    def stop_after_three(line):
        said.append(line)
        if len(said) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_node(membership, stop_after_three)
    assert said == ["connected", "the SuperNode ended with code 1; starting it again in 0 s"] * 3


def test_pauses_grow_to_a_minute_and_start_anew():
    pause, found = 0.0, []
    for _ in range(8):
        pause = processes.next_pause(pause, 1.0)
        found.append(pause)
    assert found == [1, 2, 4, 8, 16, 32, 60, 60] and processes.next_pause(pause, 61.0) == 1


def test_the_service_comes_and_goes_with_the_membership(membership, monkeypatch):
    monkeypatch.setattr("deploy.owner.service.shutil.which", lambda name: None)
    lines = install(membership)
    assert "systemctl --user enable --now" in lines[1]
    file = unit_file(membership)
    assert file.read_text() == unit_text(membership) and "Restart=always" in file.read_text()
    remove(membership)
    assert not file.exists()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_the_service_is_a_valid_unit(membership, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("deploy.owner.service._systemctl", lambda *_: False)
    install(membership)
    verify = ["systemd-analyze", "verify", "--user", "--man=no", str(unit_file(membership))]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("a\nExecStartPre=/bin/sh", "b:1"),
        ("../../PLANTED/ok", "b:1"),
        ("a", "b:1\nExecStartPre=/bin/sh"),
        ("a", "/x:1"),
    ],
)
def test_no_unit_is_written_for_a_membership_that_could_write_lines_into_it(name, address, tmp_path):
    with pytest.raises((ProtocolError, LinkError)):
        install(Membership(name, address, "/data"))
    assert not list(tmp_path.rglob("*.service"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_a_home_of_odd_characters_stays_one_path_in_the_unit(membership, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / 'ho"me\\ %h'))
    monkeypatch.setattr("deploy.owner.service._systemctl", lambda *_: False)
    install(membership)
    assert 'ho\\"me\\\\ %%h' in unit_file(membership).read_text()
    verify = ["systemd-analyze", "verify", "--user", "--man=no", str(unit_file(membership))]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "a\nExecStartPre=x"))
    with pytest.raises(ConfigError, match="printable"):
        install(membership)


def test_an_offer_cannot_draw_on_the_owner_s_terminal(membership):
    evil = "\x1b[2K\x1b[1A[/x]\n" + "y" * 10**6
    for key in ("method.name", "model.name", "num-server-rounds"):
        offer = {"settings": {"method.name": "fedkseed", key: evil}}
        told = [base_model(membership, offer), *leaves(offer)]
        told += [] if key == "method.name" else [text for _, text in terms(offer)]
        assert all(line.isprintable() and len(line) < 1000 for line in told)


def test_a_membership_is_kept_for_its_owner_alone(membership):
    file = membership.folder / "node.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(membership.folder.stat().st_mode) == 0o700


def test_leaving_asks_first(membership):
    code, out, _ = call("leave", text="n\n")
    assert code == 1 and membership.folder.exists() and "Your data stay" in out
    assert call("leave", "--yes", "--force")[0] == 0 and not membership.folder.exists()
