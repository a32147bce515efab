"""Bounded examples, noise of the stated size, and batches that nobody can foresee."""

import numpy as np
import pytest
import torch

from fedtune_strategies.zeroth_order.estimators import Point
from fedtune_strategies.zeroth_order.private import poisson_sample, private_two_sided


def slope(slopes, clip, noise=1e-12, examples=4.0):
    """Estimate on examples whose losses are linear with the given slopes."""
    place = {"at": 0.0}

    def apply(moves):
        place["at"] += sum(c for _, c in moves)

    point = Point(apply, lambda: torch.tensor(slopes, dtype=torch.float64) * place["at"], lambda k: (0.0, 0.0))
    found = private_two_sided(clip, noise, examples)(point, [], [3], 1e-3)
    apply(found.back)
    assert place["at"] == pytest.approx(0, abs=1e-12)
    return found.g[0]


def test_without_noise_and_clip_it_is_the_mean_slope():
    assert slope([1.0, 2.0, -3.0, 4.0], clip=100) == pytest.approx(1.0)


def test_one_example_more_changes_the_sum_by_at_most_the_clip():
    without = slope([1.0, 2.0], clip=0.5)
    for extra in (1e9, -1e9, np.inf, np.nan):
        assert abs(slope([1.0, 2.0, extra], clip=0.5) - without) * 4 <= 0.5 + 1e-9


def test_noise_has_the_stated_size():
    found = np.array([slope([0.0], clip=0.5, noise=3.0) for _ in range(2000)]) * 4
    assert found.std() == pytest.approx(1.5, rel=0.1) and abs(found.mean()) < 0.2


def test_an_empty_batch_is_noise_alone():
    assert slope([], clip=0.5, noise=1.0) != 0


def test_examples_are_drawn_independently():
    drawn = list(poisson_sample(50, 0.1, 2000))
    assert np.mean([len(one) for one in drawn]) == pytest.approx(5, rel=0.1)
    assert np.var([len(one) for one in drawn]) == pytest.approx(4.5, rel=0.2)
    assert list(poisson_sample(5, 1.0, 1)) == [[0, 1, 2, 3, 4]]
