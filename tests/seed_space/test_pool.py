"""Pools: definition, consistency of their operations, dtypes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.seed_space.philox import ELEMENT_SIGNS, SEED_SIGNS, signs, stream

POOLS = [("walsh", None), ("walsh", 256), ("gaussian", None)]
kinds = pytest.mark.parametrize(("kind", "transform"), POOLS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (64,), (33, 5), (300,), (2, 3, 50)]


def directions(pool, name, shape):
    return torch.stack([pool.direction(name, shape, k).flatten() for k in range(pool.size)])


def test_walsh_direction_is_the_definition():
    size, block, n, name, key = 5, 16, 41, "w", 3
    d = signs(key, stream(name, ELEMENT_SIGNS), 0, n, "cpu")
    e = signs(key, stream(name, SEED_SIGNS), 0, 8 * 3, "cpu").reshape(3, 8)
    z = directions(make_pool("walsh", key, size, block), name, (n,))
    for k in range(size):
        for j in range(n):
            assert z[k, j] == d[j] * e[j // block, k] * (-1) ** ((j % 8 & k).bit_count())


@kinds
@pytest.mark.parametrize("size", [1, 2, 5, 64, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_rebuild_is_the_sum_of_directions(kind, transform, size, shape):
    pool = make_pool(kind, 11, size, transform)
    theta, base = torch.randn(size), torch.randn(shape)
    exact = base.double().flatten() + theta.double() @ directions(pool, "w", shape).double()
    torch.testing.assert_close(pool.rebuild("w", base, theta).double().flatten(), exact, rtol=1e-5, atol=1e-5)


@kinds
@given(n=st.integers(1, 700), size=st.integers(1, 130), key=st.integers(0, 2**64 - 1))
@settings(max_examples=20, deadline=None)
def test_project_is_the_transpose_of_rebuild(kind, transform, n, size, key):
    pool = make_pool(kind, key, size, transform)
    theta, delta = torch.randn(size), torch.randn(n)
    left = pool.rebuild("w", torch.zeros(n), theta).double() @ delta.double()
    right = theta.double() @ pool.project("w", delta)
    assert left.item() == pytest.approx(right.item(), rel=1e-4, abs=1e-3)


@kinds
@given(n=st.integers(1, 700), low=st.integers(0, 700), size=st.integers(1, 130), scale=st.sampled_from([1.0, -0.3]))
@settings(max_examples=20, deadline=None)
def test_projected_slices_add_up_to_the_whole(kind, transform, n, low, size, scale):
    pool, delta, low = make_pool(kind, 8, size, transform), torch.randn(n), min(low, n)
    found = torch.ones(size)
    pool.project("w", delta[:low], scale=scale, out=found)
    assert pool.project("w", delta[low:], start=low, scale=scale, out=found) is found
    torch.testing.assert_close(found.double(), 1 + scale * pool.project("w", delta), rtol=1e-4, atol=1e-3)


def test_walsh_projection_recovers_theta_exactly_on_whole_blocks():
    pool, theta = make_pool("walsh", 5, 64), torch.randn(64)
    deltas = {
        name: pool.rebuild(name, torch.zeros(shape), theta) for name, shape in {"a": (64, 3), "b": (128,)}.items()
    }
    found = sum(pool.project(name, delta) for name, delta in deltas.items()) / (64 * 3 + 128)
    torch.testing.assert_close(found.float(), theta)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_the_float32_ones_rounded_once(kind, transform, dtype):
    pool, theta = make_pool(kind, 2, 64, transform), torch.randn(64) * 0.01
    base = torch.randn(70_001 if kind == "walsh" else 40_001).to(dtype)
    assert torch.equal(pool.rebuild("w", base, theta), pool.rebuild("w", base.float(), theta).to(dtype))
    assert torch.equal(pool.perturb("w", base, 9, 0.1), pool.perturb("w", base.float(), 9, 0.1).to(dtype))
    rounded = pool.rebuild("w", base.float(), theta, out=torch.empty_like(base))
    assert torch.equal(rounded, pool.rebuild("w", base, theta))


def test_what_is_no_number_and_what_is_infinite_stays_so_in_16_bits():
    base = torch.full((4096,), torch.nan, dtype=torch.bfloat16)
    base[1], base[2], base[3] = torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max
    pool, theta = make_pool("walsh", 1, 64), torch.full((64,), 1e36)
    expected = pool.rebuild("w", base.float(), theta).bfloat16()
    torch.testing.assert_close(pool.rebuild("w", base, theta), expected, rtol=0, atol=0, equal_nan=True)


@kinds
def test_in_place_out_of_place_and_strided_agree(kind, transform):
    pool, base = make_pool(kind, 2, 64, transform), torch.randn(30, 20)
    expected = base + 0.5 * pool.direction("w", (30, 20), 3)
    assert torch.equal(pool.perturb("w", base, 3, 0.5), expected)
    strided = torch.empty(20, 30).t()
    assert torch.equal(pool.perturb("w", base.t().contiguous().t(), 3, 0.5, out=strided), expected)
    assert pool.perturb("w", base, 3, 0.5, out=base) is base
    assert torch.equal(base, expected)


@kinds
def test_tuned_model_is_the_same_in_any_order(kind, transform):
    pool, theta = make_pool(kind, 2, 16, transform), torch.randn(16)
    base = {"a": torch.randn(5, 5), "b": torch.randn(100)}
    forward, backward = ({name: torch.empty_like(base[name]) for name in order} for order in ("ab", "ba"))
    pool.rebuild_model(forward, base, theta)
    pool.rebuild_model(backward, base, theta)
    assert all(torch.equal(forward[name], backward[name]) for name in base)


@pytest.mark.parametrize(
    "arguments",
    [("fourier", 0, 4), ("walsh", 0, 0), ("walsh", 0, 8, 4), ("walsh", 0, 8, 12), ("gaussian", 0, -1)],
)
def test_bad_pools_are_refused_in_one_line(arguments):
    with pytest.raises(ConfigError) as error:
        make_pool(*arguments)
    assert "\n" not in str(error.value)


def test_seed_and_theta_outside_the_pool_are_refused():
    pool = make_pool("walsh", 0, 4)
    with pytest.raises(ConfigError, match="seed 4"):
        pool.direction("w", (3,), 4)
    with pytest.raises(ConfigError, match="theta"):
        pool.rebuild("w", torch.zeros(3), torch.zeros(5))
    with pytest.raises(ConfigError, match="sums"):
        pool.project("w", torch.zeros(3), out=torch.zeros(5))


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
def test_what_is_read_stays_as_it_was_whatever_is_written(kind, held, out):
    pool = make_pool(kind, key=1, size=64)
    base = torch.randn(30, 70).to(held)
    before = base.clone()
    pool.rebuild("w", base, torch.randn(64), out=torch.empty(30, 70, dtype=out))
    pool.move("w", base, [(3, 0.5)], out=torch.empty(30, 70, dtype=out))
    assert torch.equal(base, before)


@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
def test_an_output_with_gaps_is_rounded_once(kind):
    pool, base, theta = make_pool(kind, key=1, size=64), torch.randn(30, 70).bfloat16(), torch.randn(64)
    gaps = torch.empty(30, 140)[:, ::2]
    assert torch.equal(pool.rebuild("w", base, theta, out=gaps), pool.rebuild("w", base.float(), theta))
