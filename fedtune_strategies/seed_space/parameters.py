"""Which tensors of a model are tuned, under which names, and whether two holders hold the same ones."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtune_strategies.errors import ModelError
from fedtune_strategies.seed_space.kernels import kernels, spread
from fedtune_strategies.seed_space.reference import word_sums

SHARE = 1 << 17  # words of 8 bytes that are worth a thread


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Give every name of a parameter the one name under which it counts: for tied weights, the first of their names."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    # Offloaded weights are separate placeholders, also where they are tied: there the model itself must tell.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in tied.items():
        if name in names and source in names and model.get_parameter(name).is_meta:
            names[name] = names[source]
    return names


def tuned_parameters(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Name the parameters that are tuned: all, or those in whose name the pattern is found.

    They are in the order of the model's modules. Tied weights appear once, under the first of their names. Left out is
    what is not trained: ``requires_grad = False`` (routing biases), integers, float8. None at all is a ModelError.
    """
    canonical = canonical_names(model)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if canonical[name] == name and _trained(parameter) and (pattern is None or re.search(pattern, name))
    }
    if not found:
        raise ModelError(f'no parameter of the model matches "{pattern}": see model.named_parameters() for the names')
    return found


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_floating_point() and parameter.itemsize > 1


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Short name of some weights: 32 hexadecimal digits of their names, shapes, dtypes and every bit.

    Any change of one element changes it for certain, other changes but for a chance of 2**-50 or less. It is the same
    in any order and on every device, and costs one read. It tells another base model, dtype, theta or a broken kernel;
    it is no proof against an adversary, who can compute other weights with the same sums.
    """
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    return combine_fingerprints({name: tensor_fingerprint(tensor) for name, tensor in items})


def combine_fingerprints(prints: Mapping[str, str]) -> str:
    """Fingerprint of some weights from those of their tensors; so tensors that did not change are not read again."""
    return _digest(sorted(prints.items()))


def tensor_fingerprint(tensor: Tensor) -> str:
    """Short name of one tensor, by its bits as stored: see `fingerprint`."""
    memory = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(memory) // 8 * 8
    words, rest = memory[:whole], memory[whole:]
    words = (words.clone() if words.storage_offset() % 8 else words).view(torch.int64)
    found = []

    def read(low: int) -> None:
        found.append(kernels(words.device).word_sums(words[low : low + share], low))

    share = SHARE if words.device.type == "cpu" else max(1, len(words))
    spread(read, range(0, len(words), share), words.device)
    if len(rest):
        last = torch.nn.functional.pad(rest.cpu(), (0, 8 - len(rest))).view(torch.int64)
        found.append(word_sums(last, len(words)))
    sums = [sum(column) % 2**64 for column in zip((0, 0), *found, strict=True)]
    return _digest([str(tensor.dtype), list(tensor.shape), sums])


def _digest(facts: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
