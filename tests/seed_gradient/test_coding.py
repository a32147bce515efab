"""Points of seed space in few bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.seed_gradient import decode, encode

BITS = st.integers(1, 8)
POINTS = arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))


@given(POINTS, BITS)
def test_a_coded_point_is_coded_without_loss(theta, bits):
    packed, unit = encode(theta, bits)
    once = decode(packed, unit, bits, len(theta))
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(theta) * bits // 8)
    again, unit_again = encode(once, bits)
    if once.any() and unit_again == unit:
        assert torch.equal(again, packed)
    assert float(np.float32(unit)) == unit


@given(POINTS, BITS)
def test_no_coefficient_is_off_by_more_than_half_a_unit_unless_it_is_clipped(theta, bits):
    packed, unit = encode(theta, bits)
    found = decode(packed, unit, bits, len(theta))
    outermost = (2 ** (bits - 1) - 0.5) * unit
    inside = np.abs(theta) <= outermost
    slack = 1e-5 * max(float(np.abs(theta).max()), unit)
    assert (np.abs(found - theta)[inside] <= unit / 2 + slack).all()
    assert (np.abs(np.abs(found[~inside]) - outermost) <= slack).all()
    assert (np.sign(found) == np.where(theta < 0, -1, 1))[unit > 0 and theta != 0].all()


@given(arrays(np.float32, st.integers(1, 200), elements=st.floats(0.125, 64, width=32)), st.data())
def test_one_bit_is_the_sign_times_the_mean_magnitude(magnitudes, data):
    signs = data.draw(arrays(np.int8, len(magnitudes), elements=st.sampled_from([-1, 1])))
    packed, unit = encode(magnitudes * signs, 1)
    np.testing.assert_allclose(
        decode(packed, unit, 1, len(signs)), signs * magnitudes.mean(dtype=np.float64), rtol=1e-6
    )


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_normal_numbers_are_coded_as_well_as_by_the_best_uniform_levels(bits, error):
    """The least mean squared errors of a uniform quantiser of a normal source (Max, 1960, table 2)."""
    theta = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    found = decode(*encode(theta, bits), bits, len(theta))
    assert np.mean((found - theta) ** 2) == pytest.approx(error, rel=0.02)


def test_bytes_are_those_that_were_promised():
    theta = np.random.default_rng(0).normal(size=16384).astype(np.float32)
    assert encode(theta, 1)[0].nbytes == 2048 and encode(theta, 4)[0].nbytes == 8192


def test_a_point_at_zero_stays_there():
    packed, unit = encode(np.zeros(10, np.float32), 4)
    assert unit == 0 and not decode(packed, unit, 4, 10).any()


@pytest.mark.parametrize(
    ("packed", "unit"),
    [
        (torch.zeros(7, dtype=torch.uint8), 1.0),
        (torch.zeros(8, dtype=torch.int8), 1.0),
        (torch.zeros(2, 4, dtype=torch.uint8), 1.0),
        (torch.zeros(8, dtype=torch.uint8), float("nan")),
        (torch.zeros(8, dtype=torch.uint8), float("inf")),
        (torch.zeros(8, dtype=torch.uint8), -1.0),
    ],
)
def test_what_is_no_coded_point_is_refused(packed, unit):
    with pytest.raises(ProtocolError):
        decode(packed, unit, 4, 16)
