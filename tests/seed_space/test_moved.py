"""Weights that many pools have moved."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.seed_space.moved import MovedWeights
from fedtune_strategies.seed_space.scaled import scaled

K = 16


def base(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in {"a": (9, 11), "b": (300,)}.items()
    }


def pool(number):
    return scaled(make_pool("walsh", number, K), {"a": 0.5, "b": 2.0})


def point(number):
    return torch.randn(K, generator=torch.Generator().manual_seed(number)) / 100


@given(st.integers(0, 6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_one_at_a_time_gives_the_bits_of_all_one_after_another(count, dtype):
    weights = MovedWeights(base(dtype))
    for number in range(count):
        weights.add(pool(number), point(number))
    assert weights.pools == count
    for name, value in base(dtype).items():
        expected = value.float() if count else value
        for number in range(count):
            expected = pool(number).rebuild(name, expected, point(number))
        assert torch.equal(weights[name], expected)


def test_the_base_is_left_alone_and_can_be_had_again():
    tensors = base()
    weights = MovedWeights(tensors)
    weights.add(pool(0), point(0))
    assert not torch.equal(weights["a"], base()["a"])
    assert all(torch.equal(tensors[name], value) for name, value in base().items())
    weights.reset()
    assert weights.pools == 0 and torch.equal(weights["a"], base()["a"])
    weights.add(pool(0), point(0))
    other = MovedWeights(base())
    other.add(pool(0), point(0))
    assert torch.equal(weights["a"], other["a"])


def test_nothing_is_left_in_the_folder(tmp_path):
    weights = MovedWeights(base(), tmp_path)
    weights.add(pool(0), point(0))
    weights.add(pool(1), point(1))
    assert list(tmp_path.iterdir()) == [] and torch.isfinite(weights["a"]).all()


@pytest.mark.parametrize("count", [1, 2])
def test_the_sums_are_in_a_file_and_not_in_memory_of_the_process(count):
    weights = MovedWeights({"w": torch.randn(1 << 22)})
    for number in range(count):
        weights.add(scaled(make_pool("walsh", number, K), {"w": 1.0}), point(number))
    address = weights["w"].data_ptr()
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (span,) = [line for line in spans if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)]
    assert span[1][3] == "s" and "deleted" in span[-1]  # shared with a file that has no name any more
