"""A device owner's commands: what they check, say, write and run; the federation itself is in test_machines."""

import io
import json
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands.agreement import ask_about
from deploy.commands.output import Format
from deploy.common import processes
from deploy.common.join_token import JoinToken
from deploy.flower import commands
from deploy.owner.consent import ALWAYS, BOUND, UNKNOWN, base_model, propose
from deploy.owner.doctor import examine, examine_membership
from deploy.owner.join import Membership, memberships, unregister
from deploy.owner.node import meanings, node_config_words, run_node, what_left
from deploy.owner.service import install, remove, unit_file, unit_text
from fedtune_strategies.config.node import NodeConfig, Terms, parse_node
from fedtune_strategies.cost import Cost
from fedtune_strategies.errors import ConfigError, DataError, LinkError, ProtocolError, ResourceError, TermsError
from fedtune_strategies.installed import installed_methods
from fedtune_strategies.run_config import parse


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
        (("x", "--data", "notes"), None, ConfigError, "x: no such file"),
        ((old, "--data", "notes"), None, ConfigError, "every account of this machine"),
        (("-", "--data", "notes"), "x\n", LinkError, "no join token"),
        (("-", "--data", "notes"), old + "\n", LinkError, "expired"),
    ]:
        code, _, shown = call("join", *arguments, text=text)
        assert code == error.exit_code and line in shown and shown.count("\n") == 1 and old not in shown


LABELS = ["why", "method", "model", "tuned", "rounds", "each round", "noise", "memory", "disk", "bytes"]


@pytest.mark.parametrize("name", installed_methods())
def test_owners_are_told_all_of_it_for_every_method(membership, name):
    asked = propose({"method.name": name, "num-server-rounds": 4, "train.batch-size": 6}, membership, 100)
    rows = dict(asked.rows)
    assert list(rows) == LABELS and all(rows.values())
    assert rows["method"].startswith(f"{name}: ") and rows["rounds"].startswith("at most 4")
    assert "6 examples in a step" in rows["each round"] and "here in" in rows["model"]
    assert "are free here" in rows["memory"] and "at most" in rows["bytes"] and "[!]" not in rows["each round"]
    assert all(line.startswith(f"{name}, ") for line in asked.leaves[: -len(ALWAYS)])
    assert len(asked.leaves) > len(ALWAYS)
    assert asked.agreement.terms.methods == name and asked.agreement.terms.bytes > 1000


def test_owners_are_warned_of_what_makes_more_of_what_leaves(membership):
    settings = {"method.name": "fedkseed", "train.parameters": "embed", "train.batch-size": 1}
    rows = dict(propose(settings, membership, 100).rows)
    assert "[!] only parameters with a match for 'embed'" in rows["tuned"] and "[!] FEW" in rows["each round"]


def test_without_the_model_the_figures_are_the_operator_s_or_there_are_none(membership):
    settings = {"method.name": "fedkseed", "model.name": "/no/such/model"}
    plan = asdict(Cost(memory=1 << 60, disk=10**6, up=1000, down=2000, record=1))
    asked = propose(settings, membership, 100, plan)
    rows = dict(asked.rows)
    assert "NOT ENOUGH" in rows["memory"] and "by the operator's figures" in rows["memory"]
    assert "comes from the server, once" in rows["model"] and asked.agreement.terms.bytes == 5346
    for forged in (None, {}, plan | {"up": "1\x1b[2K"}, plan | {"more": 1}):
        asked = propose(settings, membership, 100, forged)
        assert dict(asked.rows)["bytes"] == UNKNOWN and asked.agreement.terms.bytes == 0


def test_the_model_is_found_here_or_comes_from_the_server(membership):
    tiny = parse({})
    assert "here in" in base_model(tiny, membership)
    # What nobody named is left to each run: a model that lies here is not fetched.
    assert 'model="' not in node_config_words(membership)
    assert "which is /mine here" in base_model(tiny, Membership("a", "b:1", "c", model="/mine"))
    assert "comes from the server" in base_model(tiny, Membership("a", "b:1", "c", model="server"))
    found = {one.label: one for one in examine("", None, NodeConfig(model="server"))}
    assert found["model"].ok and "comes from the server" in found["model"].detail


def given_to_flower(membership):
    return parse_node(parse_config_args([node_config_words(membership)]))


def test_a_node_that_joined_takes_part_in_nothing_until_its_owner_agrees_or_sets_terms(membership):
    assert given_to_flower(membership).terms == Terms(methods="none")
    own = replace(membership, settings={"terms.methods": "fedkseed", "terms.batch": 4})
    assert given_to_flower(own).terms == Terms(methods="fedkseed", batch=4)


def refused(membership, **changes):
    membership.history.refuse({"method.name": "fedkseed", **changes}, "run", ["batches of 1, agreed were at least 2"])


def test_a_run_that_waits_is_shown_and_agreed_to_by_a_command(membership, tmp_path):
    (tmp_path / "my notes.jsonl").write_text('{"text": "a"}\n')
    code, _, error = call("join", "--agree")
    assert code == ConfigError.exit_code and "no run waits" in error
    refused(membership, **{"train.batch-size": 1})
    code, out, _ = call("join", "--agree", text="n\n")
    assert code == 1 and "batches of 1" in out and "[!] FEW" in out and BOUND in out
    assert membership.history.waiting() and "fedtune join --agree" in call("history")[1]
    (found,) = [one for one in examine_membership(membership) if one.label == "agreement"]
    assert found.exit_code == TermsError.exit_code and "batches of 1" in found.detail
    assert call("join", "--agree", text="y\n")[0] == 0
    assert membership.history.waiting() is None
    assert membership.history.agreement(Terms()).terms.batch == 1


def test_a_service_waits_and_says_so_and_who_said_yes_to_all_is_not_asked(membership, tmp_path, monkeypatch):
    (tmp_path / "my notes.jsonl").write_text('{"text": "a"}\n')
    said = []
    monkeypatch.setattr("deploy.commands.agreement.log", said.append)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    refused(membership)
    ask_about(membership, membership.history.waiting(), False, Format.text)
    assert membership.history.waiting() and "`fedtune join --agree` shows it and asks you" in said[0]
    ask_about(membership, membership.history.waiting(), True, Format.text)
    assert membership.history.waiting() is None and said[-1] == "agreed, as --yes says"
    # A run that nobody could show is not agreed to, not even by who says yes to all.
    for config in ({"method.name": "mine"}, {"model.name": "x" * 10**6}):
        membership.history.refuse(config, "run", ["more"])
        ask_about(membership, membership.history.waiting(), True, Format.text)
        assert membership.history.waiting() and "cannot be agreed to here" in said[-1]


def test_history_says_what_left_and_to_whom(membership):
    reply = {"run": "[/x]", "method": "fedkseed", "kind": "seed-reply", "bytes": 900, "result": True}
    for round in (1, 2):
        membership.history.append("left", round=round, **reply)
    code, out, _ = call("history")
    assert code == 0 and "2 replies, 1.8 kB, left alice for server.example:9092" in out and "[/x]" in out
    told = json.loads(call("history", "--format", "json", "--last", "1")[1])
    assert told["bytes"] == 1800 and [event["round"] for event in told["events"]] == [2]


def test_the_log_of_a_supernode_is_told_in_plain_words():
    log = (
        "INFO :      SuperNode ID: 123\nWARNING :   Connection attempt failed, retrying in 5.22 seconds\n"
        "INFO :      Connection successful after 38.82 seconds and 8 tries.\nINFO : x\n"
    )
    assert meanings(log) == [
        "connected",
        "the server cannot be reached; trying again",
        "connected again",
    ]


def test_what_left_is_told_as_it_is_written_down_and_a_greeting_is_no_task():
    row = {"event": "left", "run": "first", "round": 0, "kind": "hello-reply", "bytes": 90, "result": False}
    work = {"round": 3, "kind": "seed-reply", "bytes": 2200, "result": True}
    assert what_left(row) == "takes part in first"
    assert what_left(row | work) == "round 3: worked, and replied with 2.2 kB"
    assert what_left(row | {"kind": "failure"}) == "a task failed: the operator was told why"
    assert what_left(row | {"kind": "ack"}) == what_left({"event": "agreed"}) == ""


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


def stand_in(monkeypatch, code):
    """Let a program stand in for the SuperNode."""
    real = commands._program
    fake = {"supernode": [sys.executable, "-c", code]}
    monkeypatch.setattr(commands, "_program", lambda name: fake.get(name) or real(name))


def test_a_supernode_that_ends_is_started_again_and_again(membership, monkeypatch):
    """And nothing stays behind when its owner stops it."""
    stand_in(monkeypatch, "print('SuperNode ID: 7'); raise SystemExit(1)")
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


def test_an_operator_cannot_draw_on_the_owner_s_terminal(membership):
    evil = "\x1b[2K\x1b[1A[/x]\n" + "y" * 10**6
    pattern = "(" + "a|" * 999 + "b)"
    settings = {"method.name": "fedkseed", "model.name": evil, "run.purpose": evil, "train.parameters": pattern}
    asked = propose(settings, membership, 1)
    told = [*asked.leaves, *(text for _, text in asked.rows)]
    assert all(line.isprintable() and len(line) < 1000 for line in told)
    assert dict(asked.rows)["why"].startswith("the operator's words: “")


def test_a_membership_is_kept_for_its_owner_alone(membership):
    file = membership.folder / "node.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(membership.folder.stat().st_mode) == 0o700


def test_leaving_asks_first(membership):
    code, out, _ = call("leave", text="n\n")
    assert code == 1 and membership.folder.exists() and "Your data stay" in out
    assert call("leave", "--yes", "--force")[0] == 0 and not membership.folder.exists()


def test_a_node_that_runs_ends_when_its_owner_leaves_and_its_record_stays(membership, monkeypatch):
    stand_in(monkeypatch, "import time; print('SuperNode ID: 7', flush=True); time.sleep(600)")
    membership.history.append("left", kind="hello-reply", bytes=1)
    said, left = [], []
    leaving = threading.Thread(target=lambda: left.append(unregister(membership, tell_server=False)))

    def say(line):
        said.append(line)
        if line == "connected":
            leaving.start()

    run_node(membership, say)
    leaving.join(30)
    assert said == ["connected", "left: this machine is no member of server.example:9092 any more"]
    assert not membership.folder.exists() and "hello-reply" in left[0].read_text()
    assert stat.S_IMODE(left[0].stat().st_mode) == 0o600


def test_a_token_is_read_from_a_file_or_the_environment_and_never_from_the_list_of_processes(tmp_path, monkeypatch):
    old = JoinToken("127.0.0.1:1", "alice", bytes(32), bytes(16), int(time.time()) - 60).encode()
    (tmp_path / "token.txt").write_text(old + "\n")
    code, _, shown = call("join", str(tmp_path / "token.txt"), "--data", "notes")
    assert code == LinkError.exit_code and "expired" in shown
    for command in (("join", old, "--data", "notes"), ("doctor", old)):
        code, _, shown = call(*command)
        assert code == ConfigError.exit_code and "save it as token.txt" in shown and old not in shown
    monkeypatch.setenv("FEDTUNE_TOKEN", old)
    code, _, shown = call("join", "--data", "notes")
    assert code == LinkError.exit_code and "expired" in shown


def test_a_node_that_only_watches_its_processes_holds_no_torch():
    code = (
        "import sys, deploy.commands.join, deploy.monitoring.node, deploy.owner.node\n"
        "assert not {'torch', 'transformers', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
