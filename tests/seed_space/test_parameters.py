"""Names of tuned parameters and fingerprints."""

import pytest
import torch
from torch import nn

from fedtune_strategies.errors import ModelError
from fedtune_strategies.seed_space import fingerprint, tuned_parameters


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
