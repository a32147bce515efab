"""What becomes of a change that was made to a version of a block which is not the newest any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune_strategies.blocks.train import apply_delta


def rebased(
    current: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], gamma: float, weight: float
) -> dict[str, Tensor]:
    """Add stale changes to a block as it is now: W + Σ w·γ·ΔW.

    `deltas`: changes of an earlier version; the order of the sequence fixes the order of the sums.
    `weight`: how much a stale change counts of a prompt one, w.
    """
    block = dict(current)
    for delta in deltas:
        block = apply_delta(block, delta, weight * gamma)
    return block
