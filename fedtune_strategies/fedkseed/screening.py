"""What a scalar may be: a running amplitude, the largest scalar that counts, and nodes that are out of line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Share of the newest round in the running amplitude.
_NEWEST = 0.5


def amplitude(scalars: NDArray[np.float32]) -> float:
    """Return the median magnitude of a node's finite scalars: half of them would have to lie to change it much."""
    finite = np.abs(scalars[np.isfinite(scalars)])
    return float(np.median(finite)) if finite.size else 0.0


def running_amplitude(before: float, amplitudes: Sequence[float]) -> float:
    """Carry the running amplitude, 0 at first, on by a round: the median of its replies' counts."""
    now = float(np.median(amplitudes))
    return (1 - _NEWEST) * before + _NEWEST * now if before else now


def in_line(amplitudes: Sequence[float], factor: float) -> list[bool]:
    """Say whose amplitude is within a factor of the round's median; 0 is no limit.

    The round's own median, since slopes of all nodes may fall or grow together from one round to the next. Where no
    majority agrees, nobody can be called an outlier.
    """
    median = float(np.median(amplitudes))
    inside = [not (factor and median) or median / factor <= one <= median * factor for one in amplitudes]
    return inside if sum(inside) > len(inside) / 2 else [True] * len(inside)


def clipped(scalars: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Bound the magnitude of scalars; what is not a number stays so, an infinite one too."""
    return np.where(np.isfinite(scalars), np.clip(scalars, -limit, limit), np.float32(np.nan)).astype(np.float32)
