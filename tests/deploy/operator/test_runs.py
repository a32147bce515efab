"""Following, resuming and showing runs; Flower's control interface is a stand-in that writes ledgers itself."""

import contextlib
import io
import json
import shutil
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands import runs as commands
from deploy.common.flower_cli import Control, RunStatus
from deploy.operator import runs, watch
from deploy.operator.announcement import announce, read_announcement
from deploy.operator.members import Members
from deploy.operator.runs import find_run, settings_of, tune
from deploy.operator.watch import Lines, Screen, sparkline
from fedtune_strategies.errors import ConfigError, LedgerError, NodesError, RunError
from server_app.ledger import Ledger
from server_app.run_view import RunView
from tests.deploy.status.runs import report
from tests.federations import run as run_in_memory


class Scripted(Control):
    """Every submission does the next thing of a script to the run's ledger."""

    def begin(self, folder, *script):
        object.__setattr__(self, "script", list(script))
        object.__setattr__(self, "run", folder)
        object.__setattr__(self, "submitted", 0)
        return self

    def submit(self, app, run_config):
        object.__setattr__(self, "submitted", self.submitted + 1)
        ledger = Ledger(self.run)
        ledger.append("start", body={"config": dict(run_config), "run_id": str(self.submitted), "version": "0"})
        self.script.pop(0)(ledger)
        ledger.close()
        return self.submitted

    def status(self, run_id):
        ended = RunView(self.run)
        ended.update()
        return RunStatus("finished:completed" if ended.end else "running", "")


def dies(ledger):
    pass


def gets_on(ledger):
    number = 1 + sum(1 for _ in ledger.records("round"))
    ledger.append("round", round=number, body={"metrics": {}, "files": {}, "replies": []})


def finishes(ledger):
    ledger.append("finished", round=3, body={"model": "/tuned"})


def fails(ledger):
    ledger.append("failed", body={"exit_code": 14, "message": "nobody came"})


@pytest.fixture
def control(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(runs, "announce", lambda *_: None)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    return Scripted(tmp_path, {})


def follow(control, folder, *script):
    said = []
    settings = {"run.dir": str(folder)}
    model = tune(control.begin(folder, *script), settings, RunView(folder), lambda view: None, said.append)
    return str(model), said


def test_a_run_that_dies_is_submitted_again_until_it_is_done(control, tmp_path):
    model, said = follow(control, tmp_path / "run", dies, gets_on, gets_on, finishes)
    assert model == "/tuned" and control.submitted == 4
    assert sum("going on from its record" in line for line in said) == 3


def test_a_run_that_fails_is_not_tried_again(control, tmp_path):
    with pytest.raises(NodesError, match="nobody came"):
        follow(control, tmp_path / "run", dies, fails)
    assert control.submitted == 2


def test_a_run_that_dies_again_and_again_is_given_up(control, tmp_path):
    with pytest.raises(RunError, match="died 5 times in a row"):
        follow(control, tmp_path / "run", *[dies] * 6)
    assert control.submitted == runs.MOST_RESTARTS


def test_a_run_that_was_stopped_is_left_alone(control, tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "status", lambda self, run_id: RunStatus("finished:stopped", ""))
    with pytest.raises(RunError, match="was stopped; `fedtune resume"):
        follow(control, tmp_path / "run", gets_on, finishes)
    assert control.submitted == 1


def test_an_error_before_the_ledger_is_shown_at_once_and_not_submitted_again(control, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ASK_FIRST", 0.02)
    details = "ServerApp failed with exception: /runs/x holds a run already: choose another 'run.dir'."
    monkeypatch.setattr(Scripted, "submit", never_begins)
    monkeypatch.setattr(Scripted, "status", lambda self, run_id: RunStatus("finished:failed", details))
    with pytest.raises(RunError, match=r"^/runs/x holds a run already"):
        follow(control, tmp_path / "run")
    assert control.submitted == 1
    assert report(tmp_path / "run")["run"]["state"] == "failed"


def test_a_run_that_stays_pending_says_so(control, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ASK_FIRST", 0.01)
    answers = [RunStatus("pending", "")] * 2 + [RunStatus("finished:stopped", "")]
    monkeypatch.setattr(Scripted, "submit", never_begins)
    monkeypatch.setattr(Scripted, "status", lambda self, run_id: answers.pop(0))
    said = []
    with pytest.raises(RunError, match="was stopped"):
        tune(control.begin(tmp_path), {"run.dir": str(tmp_path)}, RunView(tmp_path), lambda view: None, said.append)
    assert sum("has not begun yet: the SuperLink says 'pending'" in line for line in said) == 2


def never_begins(control, app, run_config):
    object.__setattr__(control, "submitted", control.submitted + 1)
    return control.submitted


def test_a_run_that_is_stopped_says_so_at_once_until_it_is_resumed(control, tmp_path, monkeypatch):
    control.begin(tmp_path / "run", gets_on).submit(None, {})
    monkeypatch.setattr(Scripted, "stop_run", lambda self, run_id: None)
    runs.stop(control, tmp_path / "run")
    assert report(tmp_path / "run")["run"]["state"] == "stopped"
    with pytest.raises(RunError, match="has ended already"):
        runs.stop(control, tmp_path / "run")
    assert follow(control, tmp_path / "run", finishes)[0] == "/tuned"


def test_an_old_end_is_not_taken_for_that_of_a_resumed_run(control, tmp_path):
    with pytest.raises(NodesError):
        follow(control, tmp_path / "run", fails)
    assert follow(control, tmp_path / "run", finishes)[0] == "/tuned"


def test_runs_are_found_by_name_and_by_age(control, tmp_path):
    with pytest.raises(LedgerError, match="no run in"):
        find_run(None)
    for name in ("older", "newer"):
        with_settings = Ledger(runs.runs_folder() / name)
        with_settings.append("start", body={"config": {"method.name": name}})
        with_settings.close()
    assert find_run(None).name == "newer" and find_run(runs.Path("older")).name == "older"
    assert settings_of(find_run(None)) == {"method.name": "newer"}


def test_a_submitted_run_is_on_record_at_once_and_so_is_what_flower_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "announce", lambda *_: None)
    settings, seen = {"method.name": "fedkseed", "run.dir": str(tmp_path / "run")}, []

    def refuse(control, app, given):
        seen.append(report(tmp_path / "run")["run"])
        raise ConfigError("flwr run failed")

    monkeypatch.setattr(Control, "submit", refuse)
    with pytest.raises(ConfigError):
        runs.submit(Control(tmp_path, {}), settings)
    assert seen[0]["phase"] == "starting" and seen[0]["rounds"] == 10
    failed = report(tmp_path / "run")["run"]
    assert (failed["state"], failed["message"]) == ("failed", "flwr run failed")


def test_ctrl_c_while_following_says_that_the_run_goes_on(control, tmp_path):
    def interrupt(view):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the run continues: `fedtune status`"):
        tune(
            control.begin(tmp_path / "run", gets_on),
            {"run.dir": str(tmp_path / "run")},
            RunView(tmp_path / "run"),
            interrupt,
            print,
        )


def shown(renderable):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_long_run_that_is_followed_as_lines_loses_none(tmp_path):
    ledger, view, news, said = Ledger(tmp_path), RunView(tmp_path), Lines(), []
    ledger.append("start", body={"config": {"num-server-rounds": 900}})
    with ledger.together():
        for number in range(1, 901):
            ledger.append("refused", round=number, node="n", body={"reason": f"reason {number}"})
            ledger.append("round", round=number, body={"metrics": {}})
    for after in (ledger.append("round", round=901, body={"metrics": {}}), None):
        view.update()
        said += news(view)
        if after:
            ledger.append("lost", node="n", body={"reason": "the last"})
    ledger.close()
    assert [line.split("/")[0] for line in said if "replies" in line] == [f"round {n}" for n in range(1, 902)]
    assert [line for line in said if "reason" in line] == [f"refused: n reason {n}" for n in range(1, 901)]
    assert said[-1] == "lost: n the last"


def test_brackets_in_a_path_a_name_or_a_reason_are_shown_as_they_are(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start", body={"config": {"method.name": "mine[/m]", "model.name": "mine[/x]"}})
    ledger.append("joined", node="[/n]", body={"reason": "joined with 10 examples"})
    ledger.append("refused", round=1, node="[/n]", body={"reason": "cannot read [/r]"})
    ledger.close()
    view = RunView(tmp_path)
    view.update()
    text = shown(Screen(view))
    assert all(part in text for part in ("mine[/m]", "[/x]", "[/n]", "[/r]"))


def test_a_run_is_shown_as_screen_lines_and_json(settings, data_files, tmp_path, monkeypatch):
    run_in_memory(settings, data_files).close()
    view, news = RunView(tmp_path / "run"), Lines()
    view.update()
    lines = news(view)
    # As it happened: a round is evaluated while the next one runs.
    told = [(line.split("/")[0], "held-out" in line) for line in lines]
    rounds = [(f"round {i}", held_out) for i in range(4) for held_out in (False, True)]
    assert told == rounds[1:] and "3 of 3 replies" in lines[1] and news(view) == []
    text = shown(Screen(view))
    assert (
        "fedkseed on" in text
        and "finished" in text
        and "round 3/3" in text
        and "node-2" in text
        and "3 of 3 alive" in text
    )
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["status", str(tmp_path / "run"), "--format", "json"])
    assert json.loads(result.stdout)["run"]["state"] == "finished"
    result = CliRunner().invoke(app, ["status", str(tmp_path / "run")])
    assert result.exit_code == 0 and "\x1b[" not in result.stdout and "The tuned model:" in result.stdout
    result = CliRunner().invoke(
        app,
        ["eval", str(tmp_path / "run"), "--data", settings["eval.data"], "--answers", "0", "--format", "json"],
    )
    assert json.loads(result.stdout)["eval/loss"] == pytest.approx(view.evaluations[3].loss, abs=1e-4)


def test_no_line_is_longer_than_a_terminal_of_80_columns(monkeypatch):
    node = {
        "name": "ward-7-of-the-general-hospital-in-a-town",
        "state": "working",
        "step": (1000, 1000),
        "way": "flower",
    }
    node |= {"examples": 1234567, "loss": 12345.6, "bytes_up": 999.9e9, "bytes_down": 999.9e9, "peak_memory": 999.9e9}
    losses = [float(number % 7) * 12345 for number in range(99)]
    found = {
        "run": {
            **{"method": "fedkseed-pro", "model": "/models/" + "long-" * 20, "state": "running", "seconds": 123456.0},
            **{"seconds_left": 123456.0, "updated": time.time() - 12345, "rounds": 1000, "round": 999},
            **{"phase": "100 of 100 replied, step 1000/1000", "message": "", "exit_code": None},
        },
        "evaluations": [{"loss": loss} for loss in losses],
        "rounds": [{"train_loss": loss} for loss in losses],
        "totals": {"nodes": 100, "nodes_alive": 100, "replies": 99999, "refused": 9999}
        | {"bytes_up": 999.9e12, "bytes_down": 999.9e12},
        "nodes": [node] * 25,
        "notes": [{"time": time.time(), "kind": "refused", "node": node["name"], "reason": "said something long " * 9}],
    }
    monkeypatch.setattr(watch, "report", lambda view: found)
    text = io.StringIO()
    Console(file=text, width=80, force_terminal=True, color_system=None).print(Screen(None))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(" ward-7" in line and "step 1000/1000" in line and "999.9 GB flower" in line for line in lines[7:27])
    assert "34:17:36, 34:17:36 left" not in lines[0] and "left" in lines[0] and "3:25:45" in lines[1]


def test_small_bars_follow_the_numbers():
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" and sparkline([1.0, 1.0]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(list(map(float, range(100))))) == 40


def test_the_offer_says_what_a_run_takes(tmp_path, tiny_llama):
    assert read_announcement(tmp_path) == {}
    announce(tmp_path, {"method.name": "fedkseed", "model.name": str(tiny_llama)}, 3)
    offer = read_announcement(tmp_path)
    assert offer["settings"]["method.name"] == "fedkseed" and offer["plan"]["up"] > 0
    announce(tmp_path, {"method.name": "fedavg", "model.name": "/no/such/model"}, 3)
    assert read_announcement(tmp_path)["plan"] is None
    with pytest.raises(ConfigError, match=r"train\.lr"):
        announce(tmp_path, {"train.lr": -1.0}, 3)


def test_an_earlier_run_is_not_announced(tmp_path, tiny_llama):
    """To who joins: a run is announced until it ends, one that never began for ten minutes."""
    run = tmp_path / "run"
    announce(tmp_path, {"method.name": "fedkseed", "model.name": str(tiny_llama), "run.dir": str(run)}, 3)
    assert read_announcement(tmp_path)
    with contextlib.closing(Ledger(run)):
        assert read_announcement(tmp_path)
    assert read_announcement(tmp_path) == {}
    shutil.rmtree(run)
    offer = json.loads((tmp_path / "offer.json").read_text())
    (tmp_path / "offer.json").write_text(json.dumps(offer | {"time": offer["time"] - 601}))
    assert read_announcement(tmp_path) == {}


def test_what_cannot_work_is_not_submitted(tmp_path, monkeypatch, capsys):
    control = Control(tmp_path, {})
    monkeypatch.setattr(Control, "node_states", lambda self: {})
    Members(tmp_path).invite("alice", 60)
    with pytest.raises(NodesError, match="nobody has joined yet"):
        commands._preflight(control, {"run.dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="unknown key"):
        commands._preflight(control, {"no-key": 1})
    shown = capsys.readouterr().err
    assert "✓ model" in shown and "✗ nodes" in shown and "✗ settings" in shown


def test_paths_are_absolute_before_a_run_is_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    given = {"eval.data": "held out/*.jsonl", "run.dir": "~/run", "fedcybgd.calibration": "../text.txt"}
    found = commands._with_absolute_paths(given | {"method.name": "fedcybgd", "model.name": "model"})
    here = str(tmp_path)
    assert found["eval.data"] == f"{here}/held out/*.jsonl" and found["model.name"] == f"{here}/model"
    assert found["fedcybgd.calibration"] == f"{tmp_path.parent}/text.txt" and found["run.dir"].startswith("/")
    # What is no folder here is the name of a model, and no file is no file.
    given = {"method.name": "fedkseed", "model.name": "org/model", "eval.data": ""}
    assert commands._with_absolute_paths(given) == given


def test_a_configuration_file_is_read_flat(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('num-server-rounds = 3\n[train]\nlr = 1e-4\n[model]\nname = "x"\n')
    assert commands._from_file(file) == {"num-server-rounds": 3, "train.lr": 1e-4, "model.name": "x"}
    file.write_text("= 3")
    with pytest.raises(ConfigError, match="not TOML"):
        commands._from_file(file)
