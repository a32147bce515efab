import io
import json
import sys

from rich.console import Console
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands import plan
from fedtune_strategies.language.model_files import model_folder


def call(*arguments):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def test_every_method_is_planned_without_measuring():
    found = json.loads(call("--measure", "0", "--memory", "2", "--format", "json").stdout)
    assert [row["method"] for row in found["methods"]] == plan.methods() and len(found["methods"]) >= 6
    weights = (model_folder("fedtune-tiny") / "model.safetensors").stat().st_size
    assert {row["disk"] for row in found["methods"]} == {weights}
    assert all(row["seconds"] is None and row["fits"] for row in found["methods"])
    assert all(row["run_record"] == row["rounds"] * (row["record"] + row["replies"]) for row in found["methods"])
    assert all(0 < row["run_pruned"] < row["run_record"] for row in found["methods"])


def test_a_method_whose_library_is_not_here_is_left_out_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    said = call("--measure", "0", "--memory", "2").stdout
    assert "Left out, fedit: adapters need PEFT, here and on every node: pip install peft" in said
    assert "fedkseed-pro" in said and "\nfedit" not in said


def test_figures_come_first_and_measuring_ends_when_its_time_is_up(monkeypatch):
    def takes_for_ever(*_):
        while True:
            pass

    monkeypatch.setattr(plan, "task_seconds", takes_for_ever)
    result = call("--measure", "0.2", "--memory", "2")
    assert "not done in time" in result.stderr and "Not measured within" in result.stdout
    first, last = result.stdout.index("fedavg"), result.stdout.rindex("fedavg")
    assert first < last


def test_measured_times_make_that_of_a_run(monkeypatch):
    monkeypatch.setattr(plan, "task_seconds", lambda name, *_: 2.0 if name == "fedkseed" else None)
    rows = json.loads(call("--memory", "2", "--format", "json", "--set", "num-server-rounds=3").stdout)["methods"]
    found = {row["method"]: row for row in rows}
    assert found["fedkseed"]["run_seconds"] == 3 * (2.0 + found["fedkseed"]["link_seconds"])
    assert found["fedavg"]["run_seconds"] is None


def test_the_table_of_a_large_model_fits_80_columns():
    row = {"method": "fedkseed-pro", "measured": "", "fits": True, "seconds": 12345.0}
    row |= dict.fromkeys(("memory", "disk", "up", "down"), 999.9e9) | {"link_seconds": 123456.0, "run_seconds": 1e6}
    text = io.StringIO()
    Console(file=text, width=80).print(plan._table({"methods": [row]}))
    assert "…" not in text.getvalue() and "fedkseed-pro 999.9 GB" in text.getvalue()
