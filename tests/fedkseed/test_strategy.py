"""FedKSeed's server side against its formulas."""

import statistics

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedMedian
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.errors import ConfigError, ProtocolError
from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.pro import FedKSeedPro
from fedtune_strategies.fedkseed.seed_draws import LEVELS, MAX_ODDS, draw_seeds, mean_amplitude
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.protocol.flower import task
from fedtune_strategies.run_config import parse
from fedtune_strategies.testing import InMemoryGrid

K, TAU, ETA = 32, 8, 0.25


def make(cls=FedKSeed, **changes):
    keys = {
        "fedkseed.seeds": K,
        "train.local-steps": TAU,
        "train.lr": ETA,
        "fedkseed.clip": 0.0,
        "fedkseed.outlier": 0.0,
    }
    InMemoryGrid({})  # sets Flower's identity, without which no message can be made
    keys |= {"method.name": "fedkseed-pro"} if cls is FedKSeedPro else {}
    return cls(parse(keys | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}), {})


def reply(name, scalars, examples=1, round=1):
    values = torch.tensor(scalars, dtype=torch.float32)
    message = SeedReply(name, round, 2.0, "", examples, 1.0, 1, values, 1.0, 1e-4, 0.1)
    return task(1, message, round)


UNIFORM = np.empty(0, dtype=np.int16)


def drawn(name, round=1, odds=UNIFORM):
    return draw_seeds((0, round, name), TAU, K, odds)


scalars = st.lists(st.floats(-100, 100, width=32), min_size=TAU, max_size=TAU)


@given(st.lists(st.tuples(scalars, st.integers(1, 50)), min_size=1, max_size=4))
def test_theta_moves_by_the_weighted_scalars_of_the_drawn_seeds(answers):
    strategy = make()
    strategy.theta = np.linspace(-1, 1, K).round(2).astype(np.float16).astype(np.float32)
    start = strategy.theta.astype(np.float64)
    expected = start.copy()
    most = 10 * statistics.median_low(examples for _, examples in answers)
    total = sum(min(examples, most) for _, examples in answers)
    for number, (values, examples) in enumerate(answers):
        for seed, value in zip(drawn(f"n{number}"), values, strict=True):
            expected[seed] -= min(examples, most) / total * ETA * np.float32(value)
    messages = [reply(f"n{number}", values, examples) for number, (values, examples) in enumerate(answers)]
    arrays, _ = strategy.aggregate_train(1, messages)
    np.testing.assert_allclose(strategy.theta + strategy.carry, expected, rtol=1e-6, atol=1e-6)
    largest = np.abs(expected - start).max()
    np.testing.assert_allclose(strategy.theta, expected, atol=largest / 127 + strategy.unit)
    assert np.array_equal(arrays["theta"].numpy(), strategy.theta) and strategy.theta.dtype == np.float32


def test_uniform_weighting_counts_every_node_alike():
    strategy = make(strategy__weighting="uniform")
    arrays, _ = strategy.aggregate_train(1, [reply("a", [1.0] * TAU, 1), reply("b", [0.0] * TAU, 999)])
    np.testing.assert_allclose((arrays["theta"].numpy() + strategy.carry).sum(), -ETA * TAU / 2, rtol=1e-6)


@given(st.permutations(range(4)))
def test_the_order_of_replies_does_not_change_a_bit(order):
    values = np.random.default_rng(0).normal(size=(4, TAU)).tolist()
    arrays = [
        make().aggregate_train(1, [reply(f"n{i}", values[i], i + 1) for i in numbers])[0]["theta"].numpy()
        for numbers in (range(4), order)
    ]
    assert np.array_equal(arrays[0], arrays[1])


def test_a_skipped_step_moves_nothing():
    values = [1.0] * TAU
    values[3] = float("nan")
    strategy = make()
    _, metrics = strategy.aggregate_train(1, [reply("a", values)])
    expected = np.zeros(K)
    for step, seed in enumerate(drawn("a")):
        expected[seed] -= ETA * (step != 3)
    np.testing.assert_allclose(strategy.theta + strategy.carry, expected)
    assert metrics["train/skipped"] == 1


@pytest.mark.parametrize("cls", [FedKSeed, FedKSeedPro])
def test_a_late_reply_moves_along_the_seeds_and_by_the_step_of_its_own_round(cls):
    strategy = make(cls, strategy__late=0.5, fedkseed__theta_bits=24)
    strategy.share = 0.75
    strategy.observe(np.arange(K), np.linspace(0.1, 9, K, dtype=np.float32))
    odds = strategy.odds()
    strategy.aggregate_train(1, [reply("b", [1.0] * TAU)])
    start = strategy.theta + strategy.carry
    again = make(cls, strategy__late=0.5, fedkseed__theta_bits=24)
    again.restore(strategy.state().tensors, lambda label: None)
    again.share, lr = 0.25, [0.75 * ETA, 0.25 * ETA]
    now = again.odds()
    again.aggregate_train(2, [reply("a", [1.0] * TAU, examples=6), reply("b", [1.0] * TAU, examples=3, round=2)])
    expected = start.astype(np.float64)
    np.subtract.at(expected, drawn("a", 1, odds), lr[0] * 0.5)
    np.subtract.at(expected, drawn("b", 2, now), lr[1] * 0.5)
    np.testing.assert_allclose(again.theta + again.carry, expected, atol=1e-6)


def test_a_late_reply_is_refused_where_it_cannot_count():
    def late(round, **changes):
        strategy = make(**changes)
        strategy.fingerprint, strategy.last_fingerprint = "now", ""
        answer = SeedReply("a", round, 2.0, "", 1, 1.0, 1, torch.ones(TAU), 1.0, 1e-4, 0.1)
        return strategy.accept_late(5, answer)

    assert late(4, strategy__late=0.5)
    for refused in ({}, {"strategy__late": 0.5, "fedkseed__pool_every": 4}):
        with pytest.raises(ProtocolError, match="round was over"):
            late(4, **refused)
    with pytest.raises(ProtocolError, match="round was over"):
        late(3, strategy__late=0.5)
    with pytest.raises(ConfigError, match=r"strategy\.late.*fedmedian"):
        make(strategy__late=0.5, strategy__aggregation="fedmedian")


def test_another_flower_strategy_aggregates_theta_as_it_stands():
    values = [[1.0] * TAU, [1.0] * TAU, [1e9] * TAU]
    strategy = make()
    robust = FedKSeed(strategy.config, {}, inner=FedMedian())
    messages = [reply("a", v) for v in values]  # one name, so all draw the same seeds
    robust.aggregate_train(1, messages)
    expected = np.zeros(K)
    np.subtract.at(expected, drawn("a"), ETA)
    np.testing.assert_allclose(robust.theta + robust.carry, expected)


def test_pro_draws_uniformly_before_anything_is_known():
    assert make(FedKSeedPro).odds().size == 0


def test_pro_faithful_is_the_published_code():
    strategy = make(FedKSeedPro, fedkseed__pro_mean="faithful")
    strategy.observe(np.array([0, 0, 1]), np.array([4.0, -2.0, 5000.0], dtype=np.float32))
    # Histories [0, 4, 2], [0, 1000] and [0]: means 2, 500 and 0.
    expected = np.zeros(K)
    expected[:2] = [2.0, 500.0]
    np.testing.assert_allclose(mean_amplitude(strategy.sums, strategy.count, strategy.mean), expected)
    odds = strategy.odds()
    probability = np.exp((expected - 0) / 500)
    # Odds go down in LEVELS steps.
    np.testing.assert_allclose(odds / odds.sum(), probability / probability.sum(), rtol=0.5 / (LEVELS - 1) + 0.01)


def test_pro_counted_gives_the_unseen_the_average():
    strategy = make(FedKSeedPro)
    strategy.observe(np.array([0, 0, 1]), np.array([4.0, -2.0, 9.0], dtype=np.float32))
    mean = mean_amplitude(strategy.sums, strategy.count, strategy.mean)
    np.testing.assert_allclose(mean[:3], [3.0, 9.0, 5.0])
    odds = strategy.odds().astype(float)
    assert odds[1] == MAX_ODDS and odds[0] == odds.min()
    np.testing.assert_allclose(odds[1] / odds[0], np.e, rtol=1e-3)


def test_pro_ignores_steps_that_were_skipped():
    strategy = make(FedKSeedPro)
    strategy.observe(np.array([0, 1]), np.array([np.nan, 2.0], dtype=np.float32))
    assert strategy.count.sum() == 1 and np.isfinite(mean_amplitude(strategy.sums, strategy.count, strategy.mean)).all()


@given(st.lists(st.tuples(st.integers(0, K - 1), st.floats(width=32)), min_size=1, max_size=60))
def test_pro_odds_stay_within_their_bounds(history):
    strategy = make(FedKSeedPro)
    seeds, values = (np.array(column) for column in zip(*history, strict=True))
    strategy.observe(seeds, values.astype(np.float32))
    odds = strategy.odds()
    assert odds.size in (0, K)
    if odds.size:
        assert odds.min() >= 1 and odds.max() <= MAX_ODDS


def test_pro_replays_the_draws_that_the_nodes_made_with_the_round_s_odds():
    strategy = make(FedKSeedPro)
    strategy.observe(np.arange(K), np.linspace(0.1, 9, K, dtype=np.float32))
    odds = strategy.odds()
    strategy.aggregate_train(1, [reply("a", [1.0] * TAU), reply("b", [1.0] * TAU)])
    expected = np.ones(K, dtype=int)
    for name in "ab":
        np.add.at(expected, drawn(name, odds=odds), 1)
    assert np.array_equal(strategy.count, expected)


@pytest.mark.parametrize("cls", [FedKSeed, FedKSeedPro])
def test_a_restored_strategy_goes_on_as_the_first(cls):
    values = np.random.default_rng(1).normal(size=(3, TAU)).tolist()
    first, second = make(cls), make(cls)
    first.aggregate_train(1, [reply("a", values[0]), reply("b", values[1])])
    arrays = second.restore(first.state().tensors, lambda label: None)
    assert np.array_equal(arrays["theta"].numpy(), first.theta)
    assert np.array_equal(first.odds(), second.odds())
    again = [s.aggregate_train(2, [reply("a", values[2], round=2)])[0]["theta"].numpy() for s in (first, second)]
    assert np.array_equal(*again)
