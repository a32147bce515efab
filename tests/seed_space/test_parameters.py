"""Names of tuned parameters and fingerprints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtune_strategies.errors import ModelError
from fedtune_strategies.seed_space import (
    combine_fingerprints,
    cpu,
    fingerprint,
    reference,
    tensor_fingerprint,
    tuned_parameters,
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)


def test_tied_weights_appear_once_and_integers_never():
    assert list(tuned_parameters(Tied())) == ["embed.weight", "norm.weight", "norm.bias"]


def test_pattern_selects_and_an_empty_selection_is_refused():
    assert list(tuned_parameters(Tied(), "norm")) == ["norm.weight", "norm.bias"]
    with pytest.raises(ModelError, match="conv"):
        tuned_parameters(Tied(), "conv")


def test_frozen_and_float8_parameters_are_not_tuned():
    model = Tied()
    model.norm.bias.requires_grad = False
    model.norm.weight = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    assert list(tuned_parameters(model)) == ["embed.weight"]


@given(
    n=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    skip=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_any_changed_bit_changes_the_fingerprint(n, dtype, skip, data):
    tensor = (torch.randn(n + skip) * 50).to(dtype)[skip:]
    known = tensor_fingerprint(tensor)
    assert known == tensor_fingerprint(tensor.clone())
    memory = tensor.view(torch.uint8)
    memory[data.draw(st.integers(0, len(memory) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert tensor_fingerprint(tensor) != known


def test_two_flipped_signs_and_two_swapped_rows_change_the_fingerprint():
    tensor = torch.randn(100, 64)
    flipped, swapped = tensor.clone(), tensor[torch.tensor([1, 0, *range(2, 100)])]
    flipped[3, 5] *= -1
    flipped[70, 7] *= -1
    assert len({tensor_fingerprint(x) for x in (tensor, flipped, swapped)}) == 3


@given(n=st.integers(0, 3000), start=st.integers(0, 2**40), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_sums_on_the_cpu_are_the_reference_ones(n, start, seed):
    words = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))
    assert cpu.word_sums(words, start) == reference.word_sums(words, start)


def test_fingerprint_has_not_changed_since_it_was_defined():
    mask, total, second = 2**64 - 1, 0, 0  # in plain integers, as docs/seed-space.md says
    tensor = torch.arange(10, dtype=torch.float32)
    memory = tensor.numpy().tobytes()
    for i in range(5):
        x = (int.from_bytes(memory[8 * i : 8 * i + 8], "little") + (i + 1) * 0x9E3779B97F4A7C15) & mask
        y = (x & 0xFFFFFFFF) * (x >> 32) ^ (x << 32 & mask | x >> 32)
        total, second = (total + x) & mask, (second + ((y & 0xFFFFFFFF) * (y >> 32) ^ x)) & mask
    assert reference.word_sums(tensor.view(torch.int64)) == (total, second)
    assert tensor_fingerprint(tensor) == "3213e97cf1a39b01ee27d8afc931d78e"


def test_fingerprint_is_made_of_those_of_the_tensors_and_threads_do_not_reach_it(monkeypatch):
    tensors = {"b": torch.randn(700_001), "a": torch.randn(3, 5).t()}
    known = fingerprint(tensors)
    assert known == combine_fingerprints({name: tensor_fingerprint(tensor) for name, tensor in tensors.items()})
    monkeypatch.setattr("fedtune_strategies.seed_space.kernels.thread_count", lambda device: 3)
    assert fingerprint(tensors) == known


def test_fingerprint_ignores_order_and_tells_name_value_dtype_and_shape():
    tensors = {"a": torch.arange(5000.0), "b": torch.ones(3, 4)}
    known = fingerprint(tensors)
    assert known == fingerprint(reversed(list(tensors.items())))
    others = [
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"] + 1e-3, "b": tensors["b"]},
        {"a": tensors["a"].bfloat16(), "b": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].view(4, 3)},
        {"a": tensors["a"]},
    ]
    assert len({known, *map(fingerprint, others)}) == 6
