"""The step size over a run, the same for every method."""

from __future__ import annotations

import math


def scheduled_share(round: int, rounds: int, kind: str = "constant", warmup: float = 0.0) -> float:
    """Return the share of the highest step size that a round uses: the schedule at the middle of the round.

    It rises in a line over the share `warmup` of the run; then "constant" stays, "linear" and "cosine" end at zero.
    """
    progress = (round - 0.5) / rounds
    if progress < warmup:
        return progress / warmup
    left = (1.0 - progress) / (1.0 - warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[kind]
