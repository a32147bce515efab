import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.fedkseed.seed_draws import MAX_ODDS, draw_seeds
from fedtune_strategies.shared_random import sample

UNIFORM = np.empty(0, dtype=np.int16)


def test_reference_draws():
    # A change here would make every recorded run unreadable: nodes and servers of two releases would disagree.
    assert draw_seeds((0, 1, "n"), 10, 1024, UNIFORM).tolist() == [627, 905, 831, 915, 549, 338, 786, 854, 994, 310]
    assert sample((0, 1), ["a", "b", "c", "d"], 2) == ["a", "c"]


def test_draws_depend_on_each_part_of_the_key():
    keys = [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (0, "1", "a"), (0, 1, "a", "")]
    draws = {draw_seeds(key, 20, 4096, UNIFORM).tobytes() for key in keys}
    assert len(draws) == len(keys)


def test_odds_are_frequencies():
    draws = draw_seeds((0, 1, "n"), 100_000, 4, np.array([1, 2, 3, 0], dtype=np.int16))
    frequencies = np.bincount(draws, minlength=4) / 100_000
    np.testing.assert_allclose(frequencies, [1 / 6, 2 / 6, 3 / 6, 0], atol=0.006)


def test_largest_pool_with_largest_odds_does_not_overflow():
    odds = np.full(2**20, MAX_ODDS, dtype=np.int16)
    draws = draw_seeds((0, 1, "n"), 100_000, 2**20, odds)
    assert draws.min() >= 0 and draws.max() < 2**20
    np.testing.assert_allclose(draws.mean() / 2**20, 0.5, atol=0.005)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 5))
def test_seeds_are_in_the_pool(num_seeds, steps, seed):
    draws = draw_seeds((seed, 1, "n"), steps, num_seeds, UNIFORM)
    assert draws.shape == (steps,) and draws.min() >= 0 and draws.max() < num_seeds


@given(st.sets(st.text(min_size=1, max_size=4), min_size=1, max_size=9), st.data())
def test_a_sample_does_not_depend_on_the_order_of_names(names, data):
    count = data.draw(st.integers(1, len(names)))
    shuffled = data.draw(st.permutations(sorted(names)))
    chosen = sample((0, 1), shuffled, count)
    assert chosen == sample((0, 1), sorted(names), count)
    assert len(set(chosen)) == count and set(chosen) <= names


def test_samples_are_even():
    names = [f"node-{i}" for i in range(10)]
    counts = {name: 0 for name in names}
    for round in range(1000):
        for name in sample((7, round), names, 3):
            counts[name] += 1
    assert all(240 < count < 360 for count in counts.values())
