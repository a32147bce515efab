"""Local steps of FedKSeed: a few forward passes, one scalar, no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune_strategies.divergence import check_losses
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.layer_weights import require_reads_within_layers
from fedtune_strategies.seed_space import Pool, tuned_parameters
from fedtune_strategies.zeroth_order.estimators import ESTIMATORS, Estimator, Moves, Point, exact_slope
from fedtune_strategies.zeroth_order.layerwise import at_point

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class LocalSteps:
    """Slope and loss of each step, float32 [τ]; NaN where a loss was not finite and the step was skipped."""

    g: np.ndarray
    loss: np.ndarray


def check_steps(model: nn.Module, pattern: str | None = None) -> None:
    """Refuse a model whose `local_steps` would be wrong layer by layer; to be called once, when it has been loaded."""
    if not _moves_in_place(model, pattern):
        require_reads_within_layers(model, tuned_parameters(model, pattern))


@torch.no_grad()
def local_steps(
    model: nn.Module,
    pool: Pool,
    loss: Loss,
    batches: Iterable[Any],
    seeds: Sequence[int] | np.ndarray,
    *,
    eps: float,
    lr: float | np.ndarray,
    limit: float = math.inf,
    pattern: str | None = None,
    start: Tensor | None = None,
    base: Mapping[str, Tensor] | None = None,
    in_place: bool | None = None,
    estimator: str | Estimator = "two-sided",
    directions: int = 1,
) -> LocalSteps:
    """Take τ zeroth-order steps (FedKSeed, arXiv 2312.06353, algorithm 1).

    Step t estimates the slope g of one batch's loss along z_k, with k the t-th seed, and then sets ``W -= lr * g *
    z_k``. The model is in evaluation mode (no dropout) meanwhile. There are two ways:

    - *In place*, for float32 weights: two passes over the weights for each step, since going back, the update and the
      next perturbation are one. Each addition rounds once in float32, which leaves about 1e-7 of a weight.
    - *Layer by layer*, for 16-bit weights, weights that `accelerate` holds elsewhere, and wherever `start` is given;
      `check_steps` says whether a model can do it. The weights are never changed; updates and perturbations are
      coordinates in seed space, in float32, and every layer is rebuilt from them just before it runs (`at_point`).
      Nothing is lost to the rounding of 16-bit weights, where ``lr * g`` usually is less than half a unit in the last
      place. Meant for walsh pools: a gaussian pool costs one more direction for every step taken.

    The model begins at the round's weights and ends at the locally tuned ones (rounded once), except weights that are
    not in memory and wherever `start` is given, the round's point relative to the model's weights: there it ends as it
    began. `base` gives W_0 in place of the model's weights (`at_point`). So many `directions` in a row share a batch
    and are taken at once, from the same weights. Scalars are clipped to `limit`. A loss that rises and rises is a
    DivergenceError.
    """
    if in_place is None:
        in_place = start is None and _moves_in_place(model, pattern)
    if estimator == "forward" and not in_place:
        raise ConfigError("'fedkseed.estimator' \"forward\" needs float32 weights in memory: choose another.")
    was_training = model.training
    model.eval()
    g, losses = np.full(len(seeds), np.nan, np.float32), np.full(len(seeds), np.nan, np.float32)
    sizes = np.broadcast_to(lr, len(seeds)).tolist()
    estimate = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
    pending: Moves = []
    groups = [slice(first, first + directions) for first in range(0, len(seeds), directions)]
    with _in_place(model, pool, pattern) if in_place else _in_seed_space(model, pool, pattern, start, base) as apply:
        for group, batch in zip(groups, batches, strict=False):
            ks = [int(k) for k in seeds[group]]
            point = _point(model, pool, loss, batch, pattern, apply)
            found = estimate(point, pending, ks, eps)
            finite = np.isfinite(found.g) & np.isfinite(found.loss)
            g[group] = np.where(finite, np.clip(found.g, -limit, limit), np.nan)
            losses[group] = np.where(finite, found.loss, np.nan)
            steps = zip(ks, sizes[group], g[group], strict=True)
            check_losses(losses)
            pending = _merged(found.back, [(k, -size * float(one)) for k, size, one in steps if one == one])
        apply(pending)
    model.train(was_training)
    return LocalSteps(g, losses)


def trajectory(
    model: nn.Module,
    pool: Pool,
    pattern: str | None = None,
    start: Tensor | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> AbstractContextManager[Callable[[Moves], None]]:
    """Let a model be moved along directions by (seed, factor) pairs, in the way that suits its weights."""
    if start is None and _moves_in_place(model, pattern):
        return _in_place(model, pool, pattern)
    return _in_seed_space(model, pool, pattern, start, base)


def _moves_in_place(model: nn.Module, pattern: str | None) -> bool:
    return all(p.dtype == torch.float32 and not p.is_meta for p in tuned_parameters(model, pattern).values())


def _point(
    model: nn.Module, pool: Pool, loss: Loss, batch: Any, pattern: str | None, apply: Callable[[Moves], None]
) -> Point:
    def here() -> Tensor:
        return loss(model, batch)

    def slope(k: int) -> tuple[float, float]:
        return exact_slope(model, pool, lambda model: loss(model, batch), k, pattern)

    return Point(apply, here, slope)


def _merged(back: Moves, steps: Moves) -> Moves:
    """Going back along the direction of the only step is one move with it."""
    if len(back) == len(steps) == 1 and back[0][0] == steps[0][0]:
        return [(back[0][0], back[0][1] + steps[0][1])]
    return [*back, *steps]


@contextmanager
def _in_place(model: nn.Module, pool: Pool, pattern: str | None) -> Iterator[Callable[[Moves], None]]:
    """Moves change the weights."""
    parameters = tuned_parameters(model, pattern)

    def apply(moves: Moves) -> None:
        for name, parameter in parameters.items():
            pool.move(name, parameter, moves, out=parameter.detach())

    yield apply


@contextmanager
def _in_seed_space(
    model: nn.Module, pool: Pool, pattern: str | None, start: Tensor | None, base: Mapping[str, Tensor] | None
) -> Iterator[Callable[[Moves], None]]:
    """Moves change a point in seed space; layers are rebuilt at it as they run."""
    exact = np.zeros(pool.size) if start is None else start.double().cpu().numpy()
    point = torch.empty(pool.size, dtype=torch.float32)

    def apply(moves: Moves) -> None:
        for k, c in moves:
            exact[k] += c
        point.copy_(torch.from_numpy(exact))

    apply([])
    with at_point(model, pool, point, pattern, base):
        yield apply
    if start is None:
        for name, parameter in tuned_parameters(model, pattern).items():
            if not parameter.is_meta:
                pool.rebuild(name, parameter, point, out=parameter.detach())
