"""Every kernel against the reference: the same bits for any size, seed, split, thread count and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune_strategies.seed_space import cpu, make_pool, reference
from fedtune_strategies.seed_space.pool import _sweep

LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from([2047, 2048, 2049, 4096, 9001]))
KEYS = st.integers(0, 2**64 - 1)


@given(n=LENGTHS, bits=st.integers(0, 12), wider=st.integers(0, 4), key=KEYS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_walsh_on_the_cpu_is_the_reference(n, bits, wider, key, data):
    columns, block = 1 << bits, 1 << bits + wider
    weight, theta = torch.randn(n), torch.randn(columns)
    start = max(128, columns) * data.draw(st.integers(0, 1000))
    expected, found = torch.empty(n), torch.empty(n)
    reference.walsh_rebuild(expected, weight, theta, key, "w", columns, block, start)
    cpu.walsh_rebuild(found, weight, theta, key, "w", columns, block, start)
    assert torch.equal(expected, found)
    seeds = st.integers(0, columns - 1)
    moves = [
        (k, c) for k, c in zip(data.draw(st.lists(seeds, min_size=1, max_size=3)), (0.3, -1.7, 1e-3), strict=False)
    ]
    reference.walsh_add(expected, weight, moves, key, "w", columns, block, start)
    cpu.walsh_add(found, weight, moves, key, "w", columns, block, start)
    assert torch.equal(expected, found)
    cpu.walsh_add(weight, weight, moves, key, "w", columns, block, start)
    assert torch.equal(expected, weight)


@given(n=LENGTHS, key=KEYS, start=st.integers(0, 10**6), seeds=st.lists(st.integers(0, 2**32 - 1), max_size=3))
@settings(max_examples=30, deadline=None)
def test_gaussian_on_the_cpu_is_the_reference(n, key, start, seeds):
    weight, factors, order = torch.randn(n), torch.randn(len(seeds)), torch.tensor(seeds, dtype=torch.int64)
    expected, found = torch.empty(n), torch.empty(n)
    reference.gaussian_rebuild(expected, weight, order, factors, key, "w", 4 * start)
    cpu.gaussian_rebuild(found, weight, order, factors, key, "w", 4 * start)
    assert torch.equal(expected, found)


@given(n=LENGTHS, bits=st.integers(5, 12), wider=st.integers(0, 4), key=KEYS, rows=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_projections_on_the_cpu_are_the_reference_ones(n, bits, wider, key, rows):
    columns, block, delta = 1 << bits, 1 << bits + wider, torch.randn(n)
    start = max(128, columns) * rows
    expected = reference.walsh_project(delta, key, "w", columns, block, start)
    found = cpu.walsh_project(delta, key, "w", columns, block, start).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    expected = reference.gaussian_project(delta, 3, key, "w", start)
    torch.testing.assert_close(cpu.gaussian_project(delta, 3, key, "w", start), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [15, 17])
def test_a_transform_in_two_stages_is_the_reference(bits):
    columns, theta, weight = 1 << bits, torch.randn(1 << bits), torch.randn(3 << bits)
    expected, found = torch.empty_like(weight), torch.empty_like(weight)
    reference.walsh_rebuild(expected, weight, theta, 9, "w", columns, 2 * columns)
    cpu.walsh_rebuild(found, weight, theta, 9, "w", columns, 2 * columns)
    assert torch.equal(expected, found)
    for n in (1, columns // 4 + 1, 3 * columns):
        expected = reference.walsh_project(weight[:n], 9, "w", columns, 2 * columns)
        found = cpu.walsh_project(weight[:n], 9, "w", columns, 2 * columns).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_reach_the_bits(kind, dtype, monkeypatch):
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.SHARE", 1 << 15)
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.PART", 1 << 15)
    pool, theta = make_pool(kind, 4, 32), torch.randn(32)
    base, results = torch.randn(200_001).to(dtype), []
    for threads in (1, 2, 3):
        for module in ("pool", "kernels"):
            monkeypatch.setattr(f"fedtune_strategies.seed_space.{module}.thread_count", lambda device, t=threads: t)
        results.append(pool.rebuild("w", base, theta))
        results.append(pool.perturb("w", base, 7, 0.5, out=base.clone()))
        results.append(pool.project("w", base))
    for one, two, three in zip(results[:3], results[3:6], results[6:], strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_part_that_fails_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.PART", 1 << 10)
    monkeypatch.setattr("fedtune_strategies.seed_space.kernels.thread_count", lambda device: 2)
    pool = make_pool("walsh", 4, 64)
    monkeypatch.setattr(type(pool), "project_part", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.project("w", torch.randn(1 << 14))


def test_sweep_covers_every_element_once(monkeypatch):
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.SHARE", 64)
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.thread_count", lambda device: 3)
    monkeypatch.setattr("fedtune_strategies.seed_space.kernels.thread_count", lambda device: 3)
    for n in (1, 63, 64, 65, 1000):
        seen = _sweep(lambda out, source, start: out.copy_(source + start), torch.zeros(n).half(), None, 64)
        assert torch.equal(seen, (torch.arange(n) // 64 * 64).half())


def test_without_numba_the_reference_serves_the_cpu(monkeypatch):
    from fedtune_strategies.seed_space import kernels

    monkeypatch.setitem(__import__("sys").modules, "fedtune_strategies.seed_space.cpu", None)
    kernels._fast.cache_clear()
    assert kernels.kernels(torch.device("cpu")) is reference
    kernels._fast.cache_clear()
