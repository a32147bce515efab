import io
import json
import sys

import pytest
from rich.console import Console
from transformers import LlamaConfig
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands import plan
from deploy.owner import doctor
from fedtune_strategies.config.node import NodeConfig
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


def test_measuring_ends_when_its_time_is_up_and_a_file_has_the_table_once(monkeypatch):
    def takes_for_ever(*_):
        while True:
            pass

    monkeypatch.setattr(plan, "task_seconds", takes_for_ever)
    result = call("--measure", "0.2", "--memory", "2")
    assert "not done in time" in result.stderr and "Not measured within" in result.stdout
    assert result.stdout.count("whole run") == 1


def test_a_terminal_shows_the_figures_before_anything_is_measured(monkeypatch):
    text, shown = io.StringIO(), []
    monkeypatch.setattr(plan, "console", Console(file=text, force_terminal=True, width=80))
    monkeypatch.setattr(plan, "task_seconds", lambda *_: shown.append(text.getvalue()))
    call("--memory", "2")
    assert "fedavg" in shown[0]


@pytest.mark.parametrize(
    ("width", "inner", "layers", "heads", "parameters"),
    [(2048, 5632, 22, 4, 1_100_048_384), (4096, 11008, 32, 32, 6_738_415_616)],
)
def test_a_large_model_is_planned_by_its_config_alone_and_then_missing_weights_are_named(
    tmp_path, monkeypatch, width, inner, layers, heads, parameters
):
    LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_key_value_heads=heads, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    monkeypatch.setattr(plan, "task_seconds", None)
    model = str(tmp_path)
    found = json.loads(call("--model", model, "--format", "json", "--set", "train.local-steps=1").stdout)
    assert {row["disk"] for row in found["methods"]} == {2 * parameters}
    assert "no weights to check or measure" in plan._notes(found, 60.0)
    check = next(one for one in doctor.examine("", None, NodeConfig(model=model)) if one.label == "model")
    assert not check.ok and "holds no weights (model.safetensors)" in check.detail


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
