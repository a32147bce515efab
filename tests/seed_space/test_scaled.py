"""Directions as large on each tensor as its weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.seed_space.scaled import CHUNK, rms_scales, scaled

SCALES = {"a": 0.5, "b": 3.0}


def pools(kind="walsh"):
    pool = make_pool(kind, 5, 24)
    return pool, scaled(pool, SCALES)


@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
@pytest.mark.parametrize("name", SCALES)
def test_every_direction_is_scaled(kind, name):
    plain, pool = pools(kind)
    for k in (0, 7, 23):
        expected = plain.direction(name, (9, 11), k) * SCALES[name]
        torch.testing.assert_close(pool.direction(name, (9, 11), k), expected)


@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rebuilt_tensor_is_the_sum_of_its_scaled_directions(kind, dtype):
    _, pool = pools(kind)
    base, theta = torch.randn(9, 11).to(dtype), torch.randn(24)
    expected = base.double() + sum(float(c) * pool.direction("b", (9, 11), k).double() for k, c in enumerate(theta))
    found = pool.rebuild("b", base, theta)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_projecting_is_the_transpose_of_rebuilding(seed):
    _, pool = pools()
    generator = torch.Generator().manual_seed(seed)
    delta, theta = torch.randn(13, 8, generator=generator), torch.randn(24, generator=generator)
    moved = pool.rebuild("a", torch.zeros(13, 8), theta).double()
    there, back = float((moved * delta.double()).sum()), float((pool.project("a", delta) * theta.double()).sum())
    assert there == pytest.approx(back, rel=1e-4, abs=1e-3)


@given(st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_a_scale_is_the_root_mean_square(count, seed):
    x = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    found = rms_scales({"x": torch.from_numpy(x)})["x"]
    exact = math.sqrt(math.fsum(float(one) ** 2 for one in x) / count)
    assert found == pytest.approx(exact, rel=1e-7) and float(np.float32(found)) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_have_the_same_bits_with_any_number_of_threads(dtype):
    x = {"x": torch.randn(CHUNK + 12_345, generator=torch.Generator().manual_seed(0)).to(dtype)}
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(rms_scales(x)["x"])
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1
    assert rms_scales({"x": x["x"].float()})["x"] == found[0]


def test_a_tensor_of_zeros_is_not_tuned():
    scales = rms_scales({"a": torch.zeros(8), "b": torch.zeros(0)})
    assert scales == {"a": 0.0, "b": 0.0}
    pool = scaled(make_pool("walsh", 5, 24), scales)
    assert not pool.rebuild("a", torch.zeros(8), torch.ones(24)).any()
