import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune_strategies.seed_gradient.private import private_sum
from tests.conftest import quick

STILL = 1e-300  # a noise multiplier that cannot be seen
vectors = hnp.arrays(np.float64, 8, elements=st.floats(-1e6, 1e6)).map(torch.from_numpy)


@quick
@given(st.lists(vectors, max_size=5), vectors, st.floats(1e-3, 1e3))
def test_one_example_more_changes_the_sum_by_at_most_the_clip(examples, one, clip):
    with_one, without = (private_sum(rows, clip, STILL, 8) for rows in ([*examples, one], examples))
    assert (with_one - without).norm() <= clip * (1 + 1e-9)


@quick
@given(vectors, st.floats(1e-3, 1e3))
def test_a_short_example_counts_whole_and_a_long_one_keeps_its_direction(one, clip):
    got, norm = private_sum([one], clip, STILL, 8), float(one.norm())
    torch.testing.assert_close(got, one if norm <= clip else one * (clip / norm), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_example_that_is_not_finite_counts_as_nothing(bad):
    sound, broken = torch.ones(8, dtype=torch.float64), torch.full((8,), bad, dtype=torch.float64)
    assert torch.equal(private_sum([sound, broken], 9.0, STILL, 8), private_sum([sound], 9.0, STILL, 8))


def test_the_noise_is_normal_of_the_stated_size_also_without_examples_and_never_the_same():
    noise = private_sum([], 2.0, 1.5, 200_000).numpy() / 3.0
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert np.mean(noise**power) == pytest.approx(moment, abs=0.15)
    assert abs(np.mean(noise > 1.0) - 0.158655) < 0.006 and np.abs(noise).max() > 4.0
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    assert not np.array_equal(noise, private_sum([], 2.0, 1.5, 200_000).numpy() / 3.0)
