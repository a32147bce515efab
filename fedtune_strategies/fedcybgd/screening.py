"""What a node's change of a block may be: the parts that the run's coding makes, and of a size like the others'."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# A change is out of line if it is so many times the median of the last ones, of which there must be a few.
FACTOR = 10.0
FEWEST = 3
REMEMBERED = 31

Layout = dict[str, tuple[torch.dtype, torch.Size]]


def layout_of(parts: Mapping[str, Tensor]) -> Layout:
    """Return type and shape of each part of a coded change."""
    return {name: (part.dtype, part.shape) for name, part in parts.items()}


def expected_layout(block: Mapping[str, Tensor], upload: str) -> Layout:
    """Return what `blocks.codecs.encode` makes of a block's change.

    Parameters
    ----------
    block : mapping of str to Tensor
        The block's parameters.
    upload : str
        ``fedcybgd.upload``: float32, bf16 or int8.

    Returns
    -------
    dict of str to (torch.dtype, torch.Size)
        Type and shape of each part.
    """
    parts: Layout = {}
    for name, tensor in block.items():
        if tensor.dim() < 2 or upload == "float32":
            parts[name] = (torch.float32, tensor.shape)
        elif upload == "bf16":
            parts[name] = (torch.bfloat16, tensor.shape)
        else:
            parts[f"{name}:int8"] = (torch.int8, tensor.shape)
            parts[f"{name}:scale"] = (torch.float32, tensor.shape[:-1])
    return parts


def largest(delta: Mapping[str, Tensor]) -> float:
    """Return the maximum norm of a change.

    AdamW moves every element by about the step size, so this norm is alike for blocks of all shapes, also for an
    embedding of which few rows move; and it is the same number in whatever order it is computed.
    """
    return max(float(value.abs().max()) for value in delta.values() if value.numel())


def out_of_line(size: float, before: Sequence[float]) -> bool:
    """Say whether a change is much larger than the median of those that were committed before."""
    return len(before) >= FEWEST and size > FACTOR * statistics.median(before) > 0
