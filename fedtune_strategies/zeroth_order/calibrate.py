"""How far to step: the step size for a model, a batch and a number of steps, and how good a slope is.

Losses are taken at three distances along a few directions. Too near, rounding of the loss spoils a slope; too far, its
curvature does: both show as a difference between the slopes at two neighbouring distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune_strategies.seed_space import Pool
from fedtune_strategies.zeroth_order.steps import Loss, trajectory

DIRECTIONS = 6
# In units of the distance at which slopes are taken.
DISTANCES = (1.0, 3.0, 10.0)
# Curvature counts up to where the loss has risen by so many nats: about as far as a run goes.
_RISE = 0.5
# Of the step that ends at the lowest point of a parabola. The rest is a margin for what differs from batch to batch;
# docs/LOG.md compares the result with step sizes found by hand.
_CAUTION = 0.1
# What a round's steps may cost together by curvature, in nats: most of a slope is its batch's own, so the walk is
# mostly a random one. docs/LOG.md has what came of shorter and longer walks on three models.
_COST = 0.02


def default_distance(weights: Iterable[Tensor]) -> float:
    """Return epsilon for weights: the coarsest of their types decides, since it rounds the losses."""
    types = {tensor.dtype for tensor in weights}
    return 1e-2 if torch.bfloat16 in types else 3e-3 if torch.float16 in types else 1e-3


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: the step size, and the part of a slope that is error, as a share of its rms."""

    lr: float
    noise: float


@torch.no_grad()
def calibrate(
    model: nn.Module,
    pool: Pool,
    loss: Loss,
    batch: Any,
    seeds: Sequence[int] | np.ndarray,
    *,
    eps: float,
    steps: int,
    pattern: str | None = None,
    signs: bool = False,
    start: Tensor | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> Calibration:
    """Choose a step size, and measure how much of a slope is error: about 0 for good slopes, 1 where nothing else is.

    The step size is the smallest of three:

    - a tenth of 1 / h, where h is the mean curvature ``(L(W + d z) - 2 L(W) + L(W - d z)) / d^2`` at the widest of
      three distances d that costs less than half a nat and where it is positive;
    - that with which a walk of all `steps` along random directions raises the loss by 0.02 nats, ``steps * h * (lr *
      g)^2 / 2``, with g the root mean square of the slopes;
    - that with which one step goes as far as the widest distance.

    Where no distance shows positive curvature, it is a tenth of the last. Where steps are taken by a slope's sign, it
    is the mean length that slopes would have given. It is NaN where no loss was finite.

    All losses are of one batch: two for each direction and distance, 37 for six directions. `model` to `base` are as in
    `local_steps`; the model ends where it began, up to float32 rounding.
    """
    distances = eps * np.array(DISTANCES)
    was_training = model.training
    model.eval()
    with trajectory(model, pool, pattern, start, base) as apply:
        here = float(loss(model, batch))
        sides = np.empty((len(distances), len(seeds), 2))
        for row, distance in zip(sides, distances.tolist(), strict=True):
            for cell, k in zip(row, seeds, strict=True):
                apply([(int(k), distance)])
                cell[0] = float(loss(model, batch))
                apply([(int(k), -2 * distance)])
                cell[1] = float(loss(model, batch))
                apply([(int(k), distance)])
    model.train(was_training)
    slopes = (sides[..., 0] - sides[..., 1]) / (2 * distances[:, None])
    slope, error = _rms(slopes[0]), _rms(slopes[0] - slopes[1])
    if not math.isfinite(slope):
        return Calibration(math.nan, math.nan)
    rise = (sides.mean(axis=2) - here).mean(axis=1)
    found = _step(distances, rise, slope, steps)
    return Calibration(found * (slope if signs else 1.0), error / slope if slope else 1.0)


def _step(distances: np.ndarray, rise: np.ndarray, slope: float, steps: int) -> float:
    """Choose a step size from the mean rise of the loss at each distance, and the size of the slopes."""
    near = [i for i in range(len(distances)) if rise[i] < _RISE] or [0]  # not a number is not near
    longest = distances[near[-1]] / slope if slope else math.nan
    # Where the loss does not rise at the widest distance, the next one that shows curvature tells about it.
    bent = [i for i in near if rise[i] > 0]
    if not bent:
        return float(_CAUTION * longest)
    curvature = 2 * rise[bent[-1]] / distances[bent[-1]] ** 2
    return float(min(_CAUTION / curvature, math.sqrt(2 * _COST / curvature / steps) / slope, longest))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
