"""Which tensors of a model are tuned, under which names, and whether two holders hold the same ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedtune_strategies.errors import ModelError

TILES, TILE = 16, 64  # a fingerprint reads so many tiles of so many elements from each tensor


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Give every name of a parameter the one name under which it counts: for tied weights, the first of their names.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    dict of str to str
        Canonical name by name, in the order of the model's modules.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    # Offloaded weights are separate placeholders, also where they are tied: there the model itself must tell.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in tied.items():
        if name in names and source in names and model.get_parameter(name).is_meta:
            names[name] = names[source]
    return names


def tuned_parameters(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Name the parameters that are tuned.

    Parameters
    ----------
    model : nn.Module
        Any model.
    pattern : str, optional
        Regular expression searched for in the names; only parameters with a match are tuned. All by default.

    Returns
    -------
    dict of str to nn.Parameter
        Floating-point parameters by canonical name, in the order of the model's modules. Tied weights appear once,
        under the first of their names.

    Raises
    ------
    ModelError
        If there is none.
    """
    canonical = canonical_names(model)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if canonical[name] == name and parameter.is_floating_point() and (pattern is None or re.search(pattern, name))
    }
    if not found:
        raise ModelError(f'no parameter of the model matches "{pattern}": see model.named_parameters() for the names')
    return found


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Short name of some weights: a hash of names, shapes, dtypes and fixed tiles of the values.

    Of each tensor it reads 16 evenly spaced tiles of 64 elements, or all where it has no more. It tells another base
    model, dtype, theta or a broken kernel; it is no proof against an adversary.

    Parameters
    ----------
    tensors : mapping of str to Tensor, or iterable of (str, Tensor)
        The weights by canonical name, in any order, on any device.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    total = hashlib.sha256()
    for name, tensor in sorted(items, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        if len(flat) > TILES * TILE:
            stride = len(flat) // TILES
            flat = flat[len(flat) - TILES * stride :].view(TILES, stride)[:, -TILE:]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(flat.contiguous().view(torch.uint8).cpu().numpy())
    return total.hexdigest()[:16]
