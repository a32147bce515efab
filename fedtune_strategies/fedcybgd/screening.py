"""How large a node's change of a block may be: like the others'."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

# A change is out of line if it is so many times the median of the last ones, of which there must be a few.
FACTOR = 10.0
FEWEST = 3
REMEMBERED = 31


def largest(delta: Mapping[str, Tensor]) -> float:
    """Return the maximum norm of a change.

    AdamW moves every element by about the step size, so this norm is alike for blocks of all shapes, also for an
    embedding of which few rows move; and it is the same number in any order of computing.
    """
    return max(float(value.abs().max()) for value in delta.values() if value.numel())


def out_of_line(size: float, before: Sequence[float]) -> bool:
    """Say whether a change is much larger than the median of those that were committed before."""
    return len(before) >= FEWEST and size > FACTOR * statistics.median(before) > 0
