"""Every command speaks to programs: one JSON document on stdout, and everything for people on stderr."""

import json
from importlib.metadata import version

import click
import pytest
import typer
from typer.testing import CliRunner

from deploy.cli import app
from deploy.common.certificates import node_key
from deploy.common.flower_cli import Control
from deploy.common.join_token import JoinToken
from deploy.local import demo
from deploy.local.proxy import Traffic
from deploy.local.report import Result
from deploy.operator import runs as operator_runs
from deploy.operator import serve
from deploy.operator.members import Members
from deploy.owner import join as owner_join
from deploy.owner import node as owner_node
from deploy.owner import service
from deploy.owner.join import Membership
from fedtune_strategies.language.data import read_rows
from tests.federations import run as run_in_memory


def commands(group, name=""):
    for word, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from commands(one, f"{name}{word} ")
            if one.invoke_without_command:
                yield name + word, one
        else:
            yield name + word, one


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FEDTUNE_TOKEN", raising=False)


def facts(*arguments, text=None):
    result = CliRunner().invoke(app, [*map(str, arguments), "--format", "json"], input=text)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_it(name):
    assert any("--format" in option.opts for option in COMMANDS[name].params)


def test_keys(tmp_path):
    found = facts("keys", tmp_path, "--node", "alice")
    assert found["nodes"]["alice"]["public"] == str(node_key(tmp_path, "alice").public)
    assert found["authority"].endswith("ca.crt") and found["server"]["key"].endswith("server.key")


def test_a_run_s_record_and_model_by_folder_by_name_and_as_the_newest(settings, data_files, tmp_path):
    folder = str(tmp_path / "home" / "runs" / "first")
    run_in_memory(settings | {"num-server-rounds": 1, "run.dir": folder}, data_files).close()
    model, page = str(tmp_path / "model"), str(tmp_path / "page.html")
    for named in ((), ("first",), (folder,)):
        assert facts("export", *named, "--out", model) == {"model": model, "round": 1}
        assert facts("ledger", "verify", *named)["records"] > 3
        assert facts("ledger", "cut", *named) == {"run": folder, "cut_after": None}
        assert facts("status", *named, "--html", page) == {"page": page}
        assert facts("compare", *named)["second"] == 1
        assert facts("eval", *named, "--data", settings["eval.data"], "--answers", "0")["examples"] == 12
    assert facts("ledger", "replay")["rounds"] == 1 and facts("ledger", "show", "first", "--kind", "reply")
    first, second = facts("try", text="the cat sat on\n\n")  # a line of one's own, and one of the held-out file
    assert first["prompt"] == "the cat sat on" and second["prompt"] == read_rows(settings["eval.data"])[0].prompt
    assert (
        facts("try", "--round", "0", "-p", "a mat")[0]["base"]
        == facts("try", "--round", "0", "-p", "a mat")[0]["tuned"]
    )
    (listed,) = facts("runs")
    assert (listed["name"], listed["state"], listed["round"]) == ("first", "finished", 1)
    assert listed["loss"] == facts("status")["evaluations"][-1]["loss"]


def test_an_operator_s_words(tmp_path, monkeypatch):
    control, members = Control(tmp_path, {}), Members(tmp_path)
    monkeypatch.setattr(serve, "running", lambda folder: (control, "localhost:9092"))
    secret, _ = members.invite("alice", 60)
    key = node_key(tmp_path, "alice").public.read_text().strip()
    members.apply(secret, key, approval=True)
    found = facts("nodes", "approve", "alice")
    assert found == {"name": "alice", "state": "approved", "key": members.get("alice").fingerprint}
    assert facts("nodes", "revoke", "alice") == {"name": "alice", "state": "revoked"}
    assert Members(tmp_path).get("alice").state == "revoked"
    monkeypatch.setattr(operator_runs, "find_run", lambda run: run)
    monkeypatch.setattr(operator_runs, "stop", lambda control, folder: None)
    assert facts("stop", tmp_path) == {"folder": str(tmp_path), "state": "stopped"}


def test_an_owner_s_words_and_questions(tmp_path, monkeypatch):
    """Who joins by a program still reads, on stderr, what they agree to."""
    data = tmp_path / "notes.jsonl"
    data.write_text('{"text": "fine"}\n')
    word = JoinToken("server.example:9092", "alice", bytes(32), bytes(16), 2_000_000_000).encode()
    monkeypatch.setattr(owner_join, "fetch_server_info", lambda token: ("", {"flwr": version("flwr"), "offer": {}}))
    monkeypatch.setattr(owner_join, "register", lambda token, authority, mine, waits: mine.save() or mine)
    monkeypatch.setattr(owner_node, "run_node", lambda membership, log, asked: None)
    monkeypatch.setattr(service, "_systemctl", lambda *_: False)
    (token := tmp_path / "token.txt").write_text(word)
    result = CliRunner().invoke(app, ["join", str(token), "--data", str(data), "--format", "json"], input="y\n")
    mine = Membership("alice", "server.example:9092", str(data))
    found = json.loads(result.stdout)
    assert "Do you agree?" in result.stderr and "begins here only once you have agreed" in result.stderr
    assert found.pop("folder") == str(mine.folder) and Membership(**found) == mine
    assert "Your texts never leave" in result.stderr
    assert facts("join", "--install-service")["name"] == "alice"
    assert facts("leave", "--force", text="y\n")["name"] == "alice" and not mine.folder.exists()


def test_the_demo_gives_its_results(tmp_path, monkeypatch):
    measured = {"eval/loss": 1.0, "eval/perplexity": 2.7, "eval/rougeL": 0.5, "answers": []}
    result = Result("fedkseed", 1, 2, measured, measured, Traffic(8, 20), 1, 2.0, "/model")

    def run(*, console, on_results, **_):
        console.print("all nodes are online")
        on_results([result])

    monkeypatch.setattr(demo, "run_demo", run)
    (found,) = facts("demo", "--out", tmp_path)
    assert found["method"] == "fedkseed" and found["per_node_and_round"] == {"up": 4, "down": 10}
