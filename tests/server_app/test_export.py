"""The model after any round, from the ledger alone."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deploy.cli import app
from fedtune_strategies.errors import FingerprintError, LedgerError, ModelError
from fedtune_strategies.seed_space import fingerprint, tuned_parameters
from server_app.export import export_round
from server_app.ledger import Ledger
from tests.federations import run
from tests.models import CONFIGS, make_model, make_tokenizer


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


def test_a_run_whose_base_model_moved_goes_on_where_it_is_now(settings, data_files, tiny_llama, tmp_path):
    old, new, other = tmp_path / "old", tmp_path / "new", tmp_path / "other"
    shutil.copytree(tiny_llama, old)
    settings |= {"model.name": str(old), "eval.answers": 0}
    run(settings | {"num-server-rounds": 1}, data_files)
    old.rename(new)
    folder = Path(settings["run.dir"])
    with pytest.raises(ModelError, match="--model where the run's base model is now"):
        export_round(folder, None, tmp_path / "out")
    assert export_round(folder, None, tmp_path / "out", str(new)) == 1
    for command in (["ledger", "replay", str(folder)], ["eval", str(folder), "--data", settings["eval.data"]]):
        done = CliRunner().invoke(app, [*command, "--model", str(new)])
        assert done.exit_code == 0, done.output
    run(settings | {"model.name": str(new)}, data_files)
    assert [record.round for record in Ledger.read(folder).records("round")] == [1, 2, 3]
    foreign = make_model(CONFIGS["llama"])
    foreign.lm_head.weight.data[0, 0] += 1e-3
    foreign.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(FingerprintError, match=r"another model than the one that the run .* started with"):
        export_round(folder, None, tmp_path / "out", str(other))
