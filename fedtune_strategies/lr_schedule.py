"""The step size over a run, the same for every method."""

from __future__ import annotations

import math


def learning_rate(peak: float, round: int, rounds: int, kind: str = "constant", warmup: float = 0.0) -> float:
    """Return the step size of a round: the schedule at the middle of the round.

    Parameters
    ----------
    peak : float
        Highest step size.
    round, rounds : int
        The round, from 1, and the rounds of the run.
    kind : {"constant", "linear", "cosine"}
        Shape after the warm-up; the latter two end at zero with the run.
    warmup : float
        Share of the run, in [0, 1), over which the step size rises in a line from zero.

    Returns
    -------
    float
        Above 0, at most `peak`.
    """
    progress = (round - 0.5) / rounds
    if progress < warmup:
        return peak * progress / warmup
    left = (1.0 - progress) / (1.0 - warmup)
    return peak * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[kind]
