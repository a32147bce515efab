"""What experiment trackers are told."""

import importlib.util
import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.run_config import parse
from server_app import tracking as tracking_module
from server_app.tracking import tracking
from tests.deploy.status.runs import begin, play
from tests.federations import run


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def opened(ledger, name="tensorboard"):
    return tracking(parse({"run.report-to": name}), ledger, {"num-server-rounds": 3})


def test_a_run_reports_what_its_ledger_holds(settings, data_files):
    ledger = run(settings | {"run.report-to": "tensorboard"}, data_files)
    shown = scalars(ledger.folder)
    evaluations = {one.round: one.body["eval/loss"] for one in ledger.records("evaluation")}
    assert shown["eval/loss"] == pytest.approx(evaluations)
    rounds = {one.round: one.body["metrics"]["train/loss"] for one in ledger.records("round")}
    assert shown["train/loss"] == pytest.approx(rounds)
    assert shown["bytes/up"][3] == sum(one.body["bytes_up"] for one in ledger.records("reply"))


def test_a_resumed_run_is_reported_whole_and_once(tmp_path):
    ledger = begin(tmp_path)
    play(ledger, 1)
    with opened(ledger) as report:
        report()
    with opened(ledger) as report:
        play(ledger, 2)
        report()
        play(ledger, 3)
        report()
    ledger.close()
    assert scalars(tmp_path)["eval/loss"] == {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    ledger = begin(tmp_path)
    with opened(ledger) as report:
        monkeypatch.setattr(tracking_module, "_measured", lambda evaluation: 1 / 0)
        with caplog.at_level(logging.WARNING, "fedtune"):
            report()
            report()
    ledger.close()
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard takes no more reports: ZeroDivisionError: division by zero"
    ]


def test_a_tracker_that_is_not_installed_is_named_before_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ledger = begin(tmp_path)
    with pytest.raises(ConfigError, match="pip install trackio"), opened(ledger, "trackio"):
        pass
    ledger.close()


def test_no_tracker_costs_nothing(tmp_path):
    ledger = begin(tmp_path)
    with opened(ledger, "none") as report:
        report()
    ledger.close()
    assert not (tmp_path / "tensorboard").exists()
