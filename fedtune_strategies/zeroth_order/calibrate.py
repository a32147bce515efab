"""How far to look and how far to step: epsilon and the step size for a model and a batch, and how good a slope is.

Slopes of a few directions are taken at several distances. Too near, rounding of the loss spoils them; too far, its
curvature does. Both show as a difference between the slopes at two neighbouring distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune_strategies.seed_space import Pool
from fedtune_strategies.zeroth_order.steps import Loss, trajectory

DISTANCES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DIRECTIONS = 6
# Curvature counts up to where the loss has risen by so many nats: about as far as a run goes.
_RISE = 0.5
# Of the step that ends at the lowest point of a parabola. The rest is a margin for what differs from batch to batch;
# docs/LOG.md compares the result with step sizes found by hand.
_CAUTION = 0.1


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes
    ----------
    lr, eps : float
        Step size and distance; not a number where no loss was finite.
    noise : float
        Part of a slope that is error, as a share of its root mean square: about 0 for good slopes, 1 where nothing else
        is in them.
    """

    lr: float
    eps: float
    noise: float


@torch.no_grad()
def calibrate(
    model: nn.Module,
    pool: Pool,
    loss: Loss,
    batch: Any,
    seeds: Sequence[int] | np.ndarray,
    *,
    lr: float = 0.0,
    eps: float = 0.0,
    pattern: str | None = None,
    signs: bool = False,
) -> Calibration:
    """Choose what is not given, and measure how much of a slope is error.

    - *eps* is the distance at which slopes differ least from those at the next one, three times as far.
    - *lr* is a tenth of 1 / h, where h is the mean curvature ``(L(W + eps z) - 2 L(W) + L(W - eps z)) / eps²`` at the
      widest distance that costs less than half a nat and where it is positive; at most so long that a step goes as far
      as that distance, and a tenth of that where no distance shows positive curvature.

    Costs two losses for each direction and distance: 73 for six directions, 25 where both are given.

    Parameters
    ----------
    model, pool, loss, pattern
        See `local_steps`; the model ends where it began, up to float32 rounding.
    batch : object
        All losses are of this batch.
    seeds : sequence of int
        Directions to probe.
    lr, eps : float
        What is given; 0 where it is to be chosen.
    signs : bool
        Whether steps are taken by a slope's sign: then the step size is the mean length that slopes would have given.

    Returns
    -------
    Calibration
        Step size, distance and noise.
    """
    distances = sorted({eps, 3 * eps} - {0.0} | (set() if lr and eps else set(DISTANCES)))
    was_training = model.training
    model.eval()
    with trajectory(model, pool, pattern) as apply:
        here = float(loss(model, batch))
        sides = np.empty((len(distances), len(seeds), 2))
        for row, distance in zip(sides, distances, strict=True):
            for cell, k in zip(row, seeds, strict=True):
                apply([(int(k), distance)])
                cell[0] = float(loss(model, batch))
                apply([(int(k), -2 * distance)])
                cell[1] = float(loss(model, batch))
                apply([(int(k), distance)])
    model.train(was_training)
    steps = np.array(distances)
    slopes = (sides[..., 0] - sides[..., 1]) / (2 * steps[:, None])
    errors = np.array([_rms(near - far) for near, far in pairwise(slopes)])
    if not np.isfinite(errors).any():
        return Calibration(math.nan, math.nan, math.nan)
    at = distances.index(eps) if eps else int(np.nanargmin(errors))
    slope, rise = _rms(slopes[at]), (sides.mean(axis=2) - here).mean(axis=1)
    found = _step(steps, rise, slope) * (slope if signs else 1.0)
    return Calibration(lr or found, distances[at], float(errors[at] / slope) if slope else 1.0)


def _step(distances: np.ndarray, rise: np.ndarray, slope: float) -> float:
    """Choose a step size from the mean rise of the loss at each distance, and the size of the slopes."""
    near = [i for i in range(len(distances)) if rise[i] < _RISE] or [0]  # not a number is not near
    longest = distances[near[-1]] / slope if slope else math.nan
    # Where the loss does not rise at the widest distance, the next one that shows curvature tells about it.
    bent = [i for i in near if rise[i] > 0]
    if not bent:
        return float(_CAUTION * longest)
    curvature = 2 * rise[bent[-1]] / distances[bent[-1]] ** 2
    return float(min(_CAUTION / curvature, longest))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
