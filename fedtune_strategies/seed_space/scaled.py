"""Directions as large on each tensor as its weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune_strategies.seed_space.pool import Pool
from fedtune_strategies.seed_space.reference import Moves

CHUNK = 1 << 20  # elements whose squares are summed at once


@dataclass(frozen=True)
class ScaledPool(Pool):
    """Another pool's directions, each times a factor that depends on the tensor: ``s_t * z_k`` on tensor t.

    With `rms_scales` a step in seed space changes every tensor by the same share of its own size.
    """

    pool: Pool = field(kw_only=True)
    scales: Mapping[str, float] = field(kw_only=True)

    @property
    def _chunk(self) -> int:
        return self.pool._chunk

    @property
    def _row(self) -> int:
        return self.pool._row

    @property
    def _part(self) -> int:
        return self.pool._part

    def _point(self, theta: Tensor, device: torch.device) -> Tensor:
        return self.pool._point(theta, device)

    def _move(self, name: str, out: Tensor, weight: Tensor, moves: Moves, start: int) -> None:
        self.pool._move(name, out, weight, [(k, c * self.scales[name]) for k, c in moves], start)

    def _rebuild(self, name: str, out: Tensor, base: Tensor, theta: Tensor, start: int) -> None:
        self.pool._rebuild(name, out, base, theta * self.scales[name], start)

    def project_part(self, name: str, delta: Tensor, start: int) -> Tensor:
        """See `Pool.project_part`."""
        return self.pool.project_part(name, delta, start) * self.scales[name]


def scaled(pool: Pool, scales: Mapping[str, float]) -> ScaledPool:
    """Scale the directions of a pool."""
    return ScaledPool(pool.key, pool.size, pool=pool, scales=scales)


def rms_scales(base: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each tensor of the base model, in float32 precision; a tensor of zeros is not tuned.

    Every holder of the same tensors computes the same bits: squares of float32 are exact in float64, and they are
    summed by halves in a fixed order.
    """
    return {name: float(torch.tensor(_rms(tensor), dtype=torch.float32)) for name, tensor in base.items()}


def _rms(tensor: Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    total = math.fsum(_sum_by_halves(flat[low : low + CHUNK].double().square()) for low in range(0, len(flat), CHUNK))
    return math.sqrt(total / len(flat)) if len(flat) else 0.0


def _sum_by_halves(x: Tensor) -> float:
    x = torch.nn.functional.pad(x, (0, (1 << (len(x) - 1).bit_length()) - len(x)))
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return float(x)
