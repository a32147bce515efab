"""Scalars that are too large, and nodes that are out of line."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.screening import amplitude, clipped, in_line, running_amplitude
from fedtune_strategies.fedkseed.seed_draws import draw_seeds, seed_key
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.protocol.flower import task
from fedtune_strategies.run_config import parse
from fedtune_strategies.testing import InMemoryGrid

K, TAU = 64, 20


def make(cls=FedKSeed, **changes):
    InMemoryGrid({})
    return cls(parse({"fedkseed.seeds": K, "train.local-steps": TAU, "train.lr": 0.25} | changes), {})


def reply(name, scalars, round=1):
    return SeedReply(name, round, 2.0, "", 1, 1.0, 1, torch.from_numpy(np.float32(scalars)), 1.0, 1e-4, 0.1)


def play(strategy, replies):
    strategy.aggregate_train(replies[0].round, [task(1, one, one.round) for one in replies])


def honest(count, round=1):
    random = np.random.default_rng(round)
    return [reply(f"n{i}", random.normal(size=TAU), round) for i in range(count)]


@given(arrays.arrays(np.float32, 30, elements=st.floats(width=32)), st.floats(0.125, 1e6, width=32))
def test_clipped_scalars_are_within_the_limit_or_skipped(scalars, limit):
    found = clipped(scalars, limit)
    finite = np.isfinite(scalars)
    assert np.array_equal(np.isnan(found), ~finite) and (np.abs(found[finite]) <= limit).all()
    inside = finite & (np.abs(scalars) <= limit)
    assert np.array_equal(found[inside], scalars[inside])


def test_amplitudes_run():
    assert amplitude(np.float32([1, -3, np.nan, 2])) == 2 and amplitude(np.float32([np.nan])) == 0
    assert running_amplitude(0.0, [1, 2, 100]) == 2 and running_amplitude(4.0, [1, 2, 100]) == 3
    assert in_line([1, 1, 11], 10) == [True, True, False] and in_line([1, 1, 0.09], 10) == [True, True, False]
    assert all(in_line([1, 1, 9], 10)) and all(in_line([1, 1, 99], 0)) and all(in_line([0, 0, 99], 10))
    assert all(in_line([1, 99], 10)), "of two nobody is the outlier"


def test_one_huge_node_moves_theta_no_more_than_the_limit():
    strategy, clean = (make(**{"fedkseed.outlier": 0.0}) for _ in range(2))
    bad = reply("n9", [1e30] * TAU)
    play(strategy, [*honest(9), bad])
    play(clean, honest(9))
    limit = 10 * np.median([amplitude(one.scalars.numpy()) for one in [*honest(9), bad]])
    most = (
        0.25
        * limit
        / 10
        * np.bincount(draw_seeds(seed_key(strategy.config, 1, "n9"), TAU, K, np.empty(0, np.int16)), minlength=K)
    )
    moved = np.abs(strategy.theta + strategy.carry - 0.9 * (clean.theta + clean.carry))
    assert (moved <= most + 1e-5).all() and strategy.theta.any()


@pytest.mark.parametrize("factor", [100.0, 0.01, 1e30])
def test_a_node_out_of_line_does_not_count_and_is_named(factor, caplog):
    strategy, clean = make(), make()
    odd = reply("n9", np.full(TAU, factor, np.float32))
    play(strategy, [*honest(3), odd])
    play(clean, honest(3))
    assert np.array_equal(strategy.theta, clean.theta) and "n9 sent scalars more than 10 times" in caplog.text


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_fleet_whose_slopes_all_change_together_goes_on(factor):
    strategy = make()
    play(strategy, honest(3))
    before = strategy.theta.copy()
    changed = [reply(f"n{i}", one.scalars.numpy() * np.float32(factor), 2) for i, one in enumerate(honest(3, 2))]
    assert all(strategy.accept(2, one) for one in changed)
    play(strategy, changed)
    assert not np.array_equal(strategy.theta, before)


def test_nodes_are_told_the_limit():
    strategy = make()
    strategy.versions.add(0, [np.zeros(K, dtype=np.int32)])
    assert strategy._task(1, 0).limit == np.inf
    play(strategy, honest(3))
    assert strategy._task(1, 0).limit == pytest.approx(10 * strategy.amplitude)


def test_the_amplitude_survives_a_restart():
    strategy, again = make(), make()
    play(strategy, honest(3))
    again.restore(strategy.state().tensors, lambda label: None)
    assert again.amplitude == strategy.amplitude > 0
