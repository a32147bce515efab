"""Local steps of FedKSeed: two forward passes, one scalar, no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune_strategies.seed_space import Pool, tuned_parameters
from fedtune_strategies.zeroth_order.layerwise import at_point

Loss = Callable[[nn.Module, Any], Tensor]
Moves = list[tuple[int, float]]


@dataclass(frozen=True)
class LocalSteps:
    """What a run of local steps found.

    Attributes
    ----------
    g : np.ndarray
        float32, shape (τ,): estimated slope along each drawn direction; NaN where a loss was not finite and the step
        was skipped.
    loss : np.ndarray
        float32, shape (τ,): mean of the two losses of each step; NaN where skipped.
    """

    g: np.ndarray
    loss: np.ndarray


@torch.no_grad()
def local_steps(
    model: nn.Module,
    pool: Pool,
    loss: Loss,
    batches: Iterable[Any],
    seeds: Sequence[int] | np.ndarray,
    *,
    eps: float,
    lr: float,
    pattern: str | None = None,
    start: Tensor | None = None,
    in_place: bool | None = None,
) -> LocalSteps:
    """Take τ two-sided zeroth-order steps (FedKSeed, arXiv 2312.06353, algorithm 1; estimator of arXiv 2305.17333).

    Step t evaluates one batch at ``W ± eps * z_k``, with k the t-th seed, and then sets ``W -= lr * g * z_k`` with
    ``g = (L+ - L-) / (2 * eps)``. The model is in evaluation mode (no dropout) meanwhile. There are two ways:

    - *In place*, for float32 weights: two passes over the weights for each step, since going back, the update and
      the next perturbation are one. Each addition rounds once in float32, which leaves about 1e-7 of a weight.
    - *Layer by layer*, for 16-bit weights, weights that `accelerate` holds elsewhere, and wherever `start` is given:
      the weights are never changed; updates and perturbations are coordinates in seed space, in float32, and every
      layer is rebuilt from them just before it runs (`at_point`). Nothing is lost to the rounding of 16-bit weights,
      where ``lr * g`` usually is less than half a unit in the last place. Meant for walsh pools: a gaussian pool
      costs one more direction for every step taken.

    Parameters
    ----------
    model : nn.Module
        The model at the round's weights. It ends at the locally tuned weights (rounded once), except weights that
        are not in memory and wherever `start` is given: there it ends as it began.
    pool : Pool
        The seed pool.
    loss : callable
        ``loss(model, batch)`` gives a scalar tensor.
    batches : iterable
        At least τ batches; only τ are taken.
    seeds : sequence of int
        The drawn seeds, shape (τ,).
    eps : float
        Size of the perturbation.
    lr : float
        Step size η.
    pattern : str, optional
        Which parameters are tuned, as in `tuned_parameters`.
    start : Tensor, optional
        float32, shape (K,): the round's point relative to the model's weights, which then stay at W_0.
    in_place : bool, optional
        Choose the way; by default as above.

    Returns
    -------
    LocalSteps
        Scalars and losses of the steps.
    """
    if in_place is None:
        parameters = tuned_parameters(model, pattern).values()
        in_place = start is None and all(p.dtype == torch.float32 and not p.is_meta for p in parameters)
    trajectory = _in_place(model, pool, pattern) if in_place else _in_seed_space(model, pool, pattern, start)
    was_training = model.training
    model.eval()
    g, losses = np.full(len(seeds), np.nan, np.float32), np.full(len(seeds), np.nan, np.float32)
    pending: Moves = []
    with trajectory as apply:
        for step, (k, batch) in enumerate(zip(map(int, seeds), batches, strict=False)):
            apply([*pending, (k, eps)])
            above = float(loss(model, batch))
            apply([(k, -2 * eps)])
            below = float(loss(model, batch))
            pending = [(k, eps)]
            if math.isfinite(above) and math.isfinite(below):
                g[step], losses[step] = (above - below) / (2 * eps), (above + below) / 2
                pending = [(k, eps - lr * float(g[step]))]
        apply(pending)
    model.train(was_training)
    return LocalSteps(g, losses)


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
    model: nn.Module, pool: Pool, pattern: str | None, start: Tensor | None
) -> Iterator[Callable[[Moves], None]]:
    """Moves change a point in seed space; layers are rebuilt at it as they run."""
    exact = np.zeros(pool.size) if start is None else start.double().cpu().numpy()
    point = torch.empty(pool.size)

    def apply(moves: Moves) -> None:
        for k, c in moves:
            exact[k] += c
        point.copy_(torch.from_numpy(exact))

    apply([])
    with at_point(model, pool, point, pattern):
        yield apply
    if start is None:
        for name, parameter in tuned_parameters(model, pattern).items():
            if not parameter.is_meta:
                pool.rebuild(name, parameter, point, out=parameter.detach())
