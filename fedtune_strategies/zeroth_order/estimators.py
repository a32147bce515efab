"""Slopes of the loss along directions of a pool: by differences of losses, or exactly by forward-mode derivatives.

Every estimator starts with the model at W (after the moves still `pending`) and says which moves lead back there. All
evaluate one batch, however many directions share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.seed_space import Pool, tuned_parameters

Moves = list[tuple[int, float]]


@dataclass(frozen=True)
class Point:
    """A model that `apply` moves along directions, and one batch's loss there, with its exact slope along a seed's."""

    apply: Callable[[Moves], None]
    losses: Callable[[], Tensor]
    slope: Callable[[int], tuple[float, float]]

    def loss(self) -> float:
        """Return the loss as one number."""
        return float(self.losses())


@dataclass(frozen=True)
class Slopes:
    """Slopes `g`, the loss of each (not finite where it must not be used), and the moves that lead back to W."""

    g: list[float]
    loss: list[float]
    back: Moves


def two_sided(point: Point, pending: Moves, seeds: Sequence[int], eps: float) -> Slopes:
    """``(L(W + eps z) - L(W - eps z)) / 2 eps``: two losses a direction, error O(eps²) (arXiv 2305.17333)."""
    g, loss = [], []
    for k in seeds:
        point.apply([*pending, (k, eps)])
        above = point.loss()
        point.apply([(k, -2 * eps)])
        below = point.loss()
        pending = [(k, eps)]
        g.append((above - below) / (2 * eps))
        loss.append((above + below) / 2)
    return Slopes(g, loss, pending)


def one_sided(point: Point, pending: Moves, seeds: Sequence[int], eps: float) -> Slopes:
    """``(L(W + eps z) - L(W)) / eps``: one loss a direction and one for all, error O(eps)."""
    point.apply(pending)
    here, g, pending = point.loss(), [], []
    for k in seeds:
        point.apply([*pending, (k, eps)])
        g.append((point.loss() - here) / eps)
        pending = [(k, -eps)]
    return Slopes(g, [here if math.isfinite(one) else math.nan for one in g], pending)


def forward(point: Point, pending: Moves, seeds: Sequence[int], eps: float) -> Slopes:
    """``<grad L(W), z>`` exactly, by forward-mode derivatives: about three losses' time a direction, no eps."""
    point.apply(pending)
    found = [point.slope(k) for k in seeds]
    return Slopes(
        [slope for _, slope in found], [loss if math.isfinite(slope) else math.nan for loss, slope in found], []
    )


def sign(point: Point, pending: Moves, seeds: Sequence[int], eps: float) -> Slopes:
    """-1, 0 or 1: whether the loss rises along the direction. Every step is then as long as the step size."""
    found = two_sided(point, pending, seeds, eps)
    return Slopes(
        [math.copysign(1.0, one) if one and math.isfinite(one) else one for one in found.g], found.loss, found.back
    )


Estimator = Callable[[Point, Moves, Sequence[int], float], Slopes]
ESTIMATORS: dict[str, Estimator] = {"two-sided": two_sided, "one-sided": one_sided, "forward": forward, "sign": sign}


def exact_slope(
    model: nn.Module, pool: Pool, loss: Callable[[nn.Module], Tensor], k: int, pattern: str | None = None
) -> tuple[float, float]:
    """Loss of a model in memory and its slope ``<grad L, z_k>``, by forward-mode derivatives, which few models lack."""
    parameters = {f"model.{name}": parameter.detach() for name, parameter in tuned_parameters(model, pattern).items()}
    tangents = {
        name: pool.direction(name.removeprefix("model."), value.shape, k, value.device).to(value.dtype)
        for name, value in parameters.items()
    }
    owner = _LossOf(model, loss)

    def at(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(owner, values, ())

    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
            value, slope, *_ = torch.func.jvp(at, (parameters,), (tangents,))
    except (NotImplementedError, RuntimeError) as error:
        line = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"'fedkseed.estimator' \"forward\" does not work with this model ({line}): choose another."
        ) from None
    return float(value), float(slope)


class _LossOf(nn.Module):
    """The loss of a model as a module, so that `functional_call` can swap the model's weights."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self) -> Tensor:
        return self.loss(self.model)
