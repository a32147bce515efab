"""How large a node's change of a block may be: like the others'."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune_strategies.blocks.codecs import decode_each

# A change is out of line if it is so many times the median of the last ones, of which there must be a few.
FACTOR = 10.0
FEWEST = 3
REMEMBERED = 31


def largest(parts: Mapping[str, Tensor]) -> float:
    """Return the maximum norm of a coded change; it is not finite where a value is not.

    AdamW moves every element by about the step size, so this norm is alike for blocks of all shapes, also for an
    embedding of which few rows move; and it is the same number in any order of computing.
    """
    ends = [value.aminmax() for _, value in decode_each(parts) if value.numel()]
    return float(torch.stack([torch.maximum(high, -low).float() for low, high in ends]).max())


def out_of_line(size: float, before: Sequence[float]) -> bool:
    """Say whether a change is much larger than the median of those that were committed before."""
    return len(before) >= FEWEST and size > FACTOR * statistics.median(before) > 0
