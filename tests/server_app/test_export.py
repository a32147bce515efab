"""The model after any round, from the ledger alone."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deploy.cli import app
from fedtune_strategies.errors import LedgerError
from fedtune_strategies.seed_space import fingerprint, tuned_parameters
from server_app.export import export_round
from tests.federations import run


def weights(folder):
    return tuned_parameters(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("method", ["fedkseed-pro", "fedcybgd"])
def test_any_round_is_the_model_that_was_evaluated_then(settings, data_files, tmp_path, method):
    ledger = run(settings | {"method.name": method}, data_files)
    evaluated = {record.round: record.body["fingerprint"] for record in ledger.records("evaluation")}
    assert len(set(evaluated.values())) == 4
    for round, expected in evaluated.items():
        export_round(Path(settings["run.dir"]), round, tmp_path / f"round-{round}")
        assert fingerprint(weights(tmp_path / f"round-{round}")) == expected
    assert export_round(Path(settings["run.dir"]), None, tmp_path / "last") == 3
    assert fingerprint(weights(tmp_path / "last")) == evaluated[3]
    card = (tmp_path / "round-1" / "README.md").read_text()
    assert method in card


def test_export_says_which_rounds_there_are(settings, data_files, tmp_path):
    run(settings | {"num-server-rounds": 1}, data_files)
    with pytest.raises(LedgerError, match="has 1 round, not 5"):
        export_round(Path(settings["run.dir"]), 5, tmp_path / "out")
    result = CliRunner().invoke(app, ["export", settings["run.dir"], "--round", "0", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "round 0" in result.stdout
    missing = CliRunner().invoke(app, ["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert missing.exit_code == LedgerError.exit_code and "no run in" in missing.stderr
