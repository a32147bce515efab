"""A node's local steps in seed space: momentum for each direction, and one size for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune_strategies.divergence import check_losses
from fedtune_strategies.seed_gradient.slopes import Slopes
from fedtune_strategies.seed_space import Pool


@dataclass(frozen=True)
class LocalWalk:
    """The point reached from 0, float32 [K], and each batch's loss before its step; NaN where it was skipped."""

    theta: Tensor
    loss: np.ndarray


def local_walk(
    place: Callable[[Tensor], None],
    pool: Pool,
    find: Callable[[Any], Slopes],
    batches: Iterable[Any],
    *,
    step: float,
    beta1: float = 0.5,
    beta2: float = 0.999,
) -> LocalWalk:
    """Walk downhill from theta = 0 in a pool.

    Each step begins at the weights ``W = W_r + sum_k theta_k z_k``, rounded once, so nothing is lost in 16 bits, and
    moves theta by ``-(step / sqrt(K)) m / sqrt(v)``: m is the running mean of the slopes, v that of their mean square
    over all K, both without their bias towards 0. One v for all directions, since a direction is a random one: none is
    steeper than the others by itself.

    `place` puts the model at a point, and `find` gives loss and slopes of a batch there. A step changes the weights by
    the root mean square `step`, in units of the pool's scales. A loss that rises and rises is a DivergenceError.
    """
    theta, mean = torch.zeros(pool.size, dtype=torch.float64), torch.zeros(pool.size, dtype=torch.float64)
    square, taken = 0.0, 0
    losses: list[float] = []
    for batch in batches:
        place(theta.float())
        loss, g = find(batch)
        finite = math.isfinite(loss) and bool(g.isfinite().all())
        losses.append(loss if finite else math.nan)
        check_losses(losses)
        if not finite:
            continue
        taken += 1
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square = beta2 * square + (1 - beta2) * float(g.square().mean())
        size = math.sqrt(square / (1 - beta2**taken))
        if size:
            theta.sub_(mean, alpha=step / math.sqrt(pool.size) / (1 - beta1**taken) / size)
    return LocalWalk(theta.float(), np.array(losses, np.float32))
