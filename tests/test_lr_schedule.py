"""The step size over a run, the same for every method."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.lr_schedule import scheduled_share

KINDS = ("constant", "linear", "cosine")


def rates(kind, warmup, rounds):
    return [2.0 * scheduled_share(number, rounds, kind, warmup) for number in range(1, rounds + 1)]


def test_the_shapes():
    assert rates("constant", 0.0, 3) == [2.0, 2.0, 2.0]
    assert rates("linear", 0.0, 4) == pytest.approx([1.75, 1.25, 0.75, 0.25])
    assert rates("cosine", 0.0, 2) == pytest.approx([1 + math.sqrt(0.5), 1 - math.sqrt(0.5)])
    assert rates("constant", 0.5, 4) == pytest.approx([0.5, 1.5, 2.0, 2.0])


@given(st.sampled_from(KINDS), st.floats(0.0, 0.9), st.integers(1, 200))
def test_a_step_size_rises_through_the_warmup_then_falls_and_stays_above_zero(kind, warmup, rounds):
    found = rates(kind, warmup, rounds)
    top = found.index(max(found))
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:], reverse=True)
