"""Two rounds of one run, compared from the ledger alone."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deploy.cli import app
from fedtune_strategies.errors import LedgerError
from server_app.compare import compare_rounds
from server_app.export import open_run
from server_app.ledger import Ledger
from tests.federations import run


@pytest.fixture
def tuned(settings, data_files):
    """Folder of a run of two rounds that tunes the first layer alone."""
    settings |= {"num-server-rounds": 2, "eval.answers": 0, "eval.every": 2, "train.parameters": r"layers\.0\."}
    run(settings, data_files)
    return Path(settings["run.dir"])


def test_a_change_is_that_of_the_weights(tuned):
    _, language, rebuild = open_run(tuned, Ledger.read(tuned))
    vectors = [torch.cat([p.detach().flatten() for p in language.model.parameters()]) for _ in map(rebuild, (1, 2))]
    change = compare_rounds(tuned, 1, 2)
    assert change.relative == pytest.approx(float((vectors[1] - vectors[0]).norm() / vectors[0].norm()), rel=1e-4)
    assert change.changed == pytest.approx(float((vectors[1] != vectors[0]).float().mean()), rel=1e-4)
    moved = [tensor.name for tensor in change.tensors if tensor.changed]
    assert moved and all(".layers.0." in name for name in moved)
    assert [tensor.relative for tensor in change.tensors] == sorted((t.relative for t in change.tensors), reverse=True)
    assert change.loss[0] is None and change.loss[1] > 0  # round 1 was not evaluated


def test_a_round_does_not_differ_from_itself(tuned):
    change = compare_rounds(tuned, 1, 1)
    assert change.relative == change.changed == 0


def test_the_command(tuned):
    told = CliRunner().invoke(app, ["compare", str(tuned), "--top", "1"])
    assert told.exit_code == 0 and "from round 0 to 2" in told.stdout and ".layers.0." in told.stdout
    facts = json.loads(CliRunner().invoke(app, ["compare", str(tuned), "--format", "json"]).stdout)
    assert facts["second"] == 2 and facts["loss"][0] > 0
    missing = CliRunner().invoke(app, ["compare", str(tuned), "--to", "9"])
    assert missing.exit_code == LedgerError.exit_code and "has 2 rounds, not 9" in missing.stderr
