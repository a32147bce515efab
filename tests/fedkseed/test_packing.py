import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedkseed.packing import pack, read_scalars, round_scalars, unpack


@given(
    arrays.arrays(np.int32, st.integers(1, 300), elements=st.integers(-(2**20), 2**20)),
    st.integers(0, 9),
)
def test_whole_numbers_come_back(values, shift):
    values = values << shift
    assert np.array_equal(unpack(pack(values), len(values)), values)


@pytest.mark.parametrize("values", [[0], [1], [-1], [2**30 - 1, -(2**30)], [0] * 50, [-(2**29), 2**29]])
def test_extremes_come_back(values):
    values = np.array(values, dtype=np.int32)
    assert np.array_equal(unpack(pack(values), len(values)), values)


@pytest.mark.parametrize(("bits", "limit"), [(8, 4096), (16, 8192), (24, 12288)])
def test_no_entry_needs_more_than_its_bytes(bits, limit):
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), 4096, dtype=np.int32)
    assert pack(values << 5).numel() <= limit + 20


def test_few_changes_need_few_bytes():
    values = np.zeros(4096, dtype=np.int32)
    values[np.random.default_rng(0).choice(4096, 200, replace=False)] = 77 * 2**12
    assert pack(values).numel() < 450


@given(st.binary(max_size=60), st.integers(1, 50))
def test_damaged_bytes_are_refused_or_are_as_many_numbers(data, count):
    try:
        values = unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0), count)
    except ProtocolError:
        return
    assert values.shape == (count,) and values.dtype == np.int32


def test_a_flood_behind_few_bytes_is_refused():
    with pytest.raises(ProtocolError, match="not 10"):
        unpack(pack(np.zeros(10_000_000, dtype=np.int32)), 10)


@pytest.mark.parametrize(("bits", "error"), [(32, 0.0), (16, 5e-4), (8, 1 / 254)])
def test_scalars_lose_as_much_as_they_may(bits, error):
    scalars = np.random.default_rng(0).normal(size=200).astype(np.float32) * 1e6
    scalars[3] = np.nan
    again = read_scalars(*round_scalars(scalars, bits))
    assert again.dtype == np.float32 and np.isnan(again[3])
    assert np.nanmax(np.abs(again - scalars)) <= error * np.nanmax(np.abs(scalars)) * 1.001


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_scalars_that_are_all_alike_or_not_there(bits):
    for value in (0.0, np.nan):
        again = read_scalars(*round_scalars(np.full(5, value, dtype=np.float32), bits))
        assert np.array_equal(again, np.full(5, value, dtype=np.float32), equal_nan=True)
