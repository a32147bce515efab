"""Local steps of FedKSeed: two forward passes, one scalar, no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune_strategies.seed_space import Pool, tuned_parameters


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
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    seeds: Sequence[int] | np.ndarray,
    *,
    eps: float,
    lr: float,
    pattern: str | None = None,
) -> LocalSteps:
    """Take τ two-sided zeroth-order steps (FedKSeed, arXiv 2312.06353, algorithm 1; estimator of arXiv 2305.17333).

    Step t evaluates one batch at ``W ± eps * z_k``, with k the t-th seed, and then sets ``W -= lr * g * z_k`` with
    ``g = (L+ - L-) / (2 * eps)``. The model is in evaluation mode (no dropout) meanwhile.

    Parameters
    ----------
    model : nn.Module
        The model at the round's weights. It ends at the locally tuned weights.
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

    Returns
    -------
    LocalSteps
        Scalars and losses of the steps.
    """
    parameters = tuned_parameters(model, pattern)
    was_training = model.training
    model.eval()

    def move(k: int, c: float) -> None:
        for name, parameter in parameters.items():
            pool.perturb(name, parameter, k, c, out=parameter.detach())

    g, losses = np.full(len(seeds), np.nan, np.float32), np.full(len(seeds), np.nan, np.float32)
    for step, (k, batch) in enumerate(zip(map(int, seeds), batches, strict=False)):
        move(k, eps)
        above = float(loss(model, batch))
        move(k, -2 * eps)
        below = float(loss(model, batch))
        finite = math.isfinite(above) and math.isfinite(below)
        if finite:
            g[step], losses[step] = (above - below) / (2 * eps), (above + below) / 2
        move(k, eps - lr * float(g[step]) if finite else eps)
    model.train(was_training)
    return LocalSteps(g, losses)
