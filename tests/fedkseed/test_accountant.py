"""Epsilon against published values, and private runs."""

import math

import pytest

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.fedkseed import gradient_client
from fedtune_strategies.fedkseed.accountant import epsilon
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import defaults, parse
from tests.federations import final_state, run

pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")


def config(**changes):
    keys = {"privacy.clip": 1.0, "train.lr": 1e-4, "train.local-steps": 1, "train.batch-size": 1}
    return parse(keys | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()})


def test_published_values():
    # Abadi et al. (arXiv 1607.00133, section 3.1): q = 0.01, sigma = 4, 10,000 steps, delta = 1e-5: epsilon about 1.26.
    # The accountant of today is tighter, hence at most that.
    found = epsilon(config(privacy__noise_multiplier=4.0), [(10_000, 100)])
    assert 1.0 < found <= 1.26
    # A single Gaussian mechanism: between the exact value (arXiv 1805.06530) and the classical bound.
    single = epsilon(config(privacy__noise_multiplier=10.0), [(1, 1)])
    assert 0.3 < single < math.sqrt(2 * math.log(1.25e5)) / 10


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_data():
    base = epsilon(config(), [(5, 100)])
    assert epsilon(config(), [(10, 100)]) > base > epsilon(config(), [(5, 1000)]) > 0
    assert epsilon(config(privacy__noise_multiplier=2.0), [(5, 100)]) < base
    assert epsilon(config(), [(1, 1000), (5, 100)]) == base
    assert epsilon(config(), []) == 0


GRADIENT = {"fedkseed.estimator": "gradient", "train.lr": "auto"}


@pytest.mark.parametrize("own", [{}, GRADIENT], ids=["two-sided", "gradient"])
def test_a_private_run_reports_epsilon_and_no_loss(settings, data_files, tmp_path, own):
    settings = {key: value for key, value in settings.items() if key in defaults("fedkseed", own)} | own
    settings |= {"privacy.clip": 1.0, "privacy.noise-multiplier": 0.7, "num-server-rounds": 2, "eval.answers": 0}
    ledger = run(settings, data_files)
    spent = [record.body["metrics"]["privacy/epsilon"] for record in ledger.records("round")]
    assert 0 < spent[0] < spent[1]
    assert all(math.isnan(record.body["loss"]) for record in ledger.records("reply"))
    other = settings | {"run.dir": str(tmp_path / "other")}
    run(other, data_files)
    assert final_state(other) != final_state(settings), "noise must not repeat"


def test_what_a_private_node_sends_does_not_say_that_a_loss_was_not_finite(settings, data_files, monkeypatch):
    settings = {key: value for key, value in settings.items() if key in defaults("fedkseed", GRADIENT)} | GRADIENT
    settings |= {"privacy.clip": 1.0, "num-server-rounds": 1, "eval.data": ""}
    monkeypatch.setattr(gradient_client, "response_loss", lambda model, batch: response_loss(model, batch) * math.nan)
    ledger = run(settings, data_files)
    replies = [protocol.decode("gradient-reply", ledger.payload(record)) for record in ledger.records("reply")]
    assert len(replies) == 3 and all(reply.skipped == 0 and reply.unit > 0 for reply in replies)


@pytest.mark.parametrize(
    "key", [{"fedkseed.estimator": "sign"}, {"fedkseed.directions": 2}, {"method.name": "fedcybgd"}]
)
def test_what_cannot_be_private_is_refused(key):
    with pytest.raises(ConfigError, match=r"privacy\.clip"):
        parse({"privacy.clip": 1.0, "train.lr": 1e-4} | key)
