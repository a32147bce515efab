"""Differentially private slopes: each example's part is bounded, and noise is added before a scalar leaves the node.

DPZero (arXiv 2310.09639, algorithm 2): privacy needs noise on one scalar a step, not on every parameter.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

import numpy as np

from fedtune_strategies.zeroth_order.estimators import Estimator, Moves, Point, Slopes


def private_two_sided(clip: float, noise_multiplier: float, examples: float) -> Estimator:
    """Make the estimator ``(sum_i clip(d_i) + noise) / B`` with ``d_i = (l_i(W + eps z) - l_i(W - eps z)) / 2 eps``.

    One example more or less in the batch changes the sum by at most `clip`; the noise is normal with standard deviation
    ``noise_multiplier * clip``. It comes from the operating system, so nobody can replay it. An example whose losses
    are not finite counts as 0, so that it cannot be seen either. B is the expected number of examples in a batch, since
    the true one is private. Points give the losses of each example, and no loss is reported.
    """
    random = secrets.SystemRandom()

    def estimate(point: Point, pending: Moves, seeds: Sequence[int], eps: float) -> Slopes:
        g = []
        for k in seeds:
            point.apply([*pending, (k, eps)])
            above = point.losses().double().cpu().numpy()
            point.apply([(k, -2 * eps)])
            difference = (above - point.losses().double().cpu().numpy()) / (2 * eps)
            pending = [(k, eps)]
            bounded = np.clip(np.nan_to_num(difference, nan=0.0, posinf=0.0, neginf=0.0), -clip, clip)
            g.append(float(bounded.sum() + random.gauss(0.0, noise_multiplier * clip)) / examples)
        return Slopes(g, [0.0] * len(g), pending)

    return estimate


def poisson_sample(count: int, rate: float, steps: int) -> Iterator[list[int]]:
    """Draw each step's batch: every example with the same probability, independently, by numbers nobody else knows."""
    random = secrets.SystemRandom()
    for _ in range(steps):
        yield [i for i in range(count) if random.random() < rate]
