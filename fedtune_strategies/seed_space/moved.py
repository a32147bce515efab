"""Weights that many pools have moved, one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune_strategies.seed_space.pool import Pool


class AtPoint(Mapping[str, Tensor]):
    """All weights of a model at the point theta of a pool, each made when it is asked for; theta may be set in between.

    The pool moves those in `tuned`, which hold the weights at theta = 0; `others` holds all, in the dtype that is given
    out.
    """

    def __init__(self, pool: Pool, tuned: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        self._pool, self._tuned, self._others = pool, tuned, others
        self._dtype = others[next(iter(others))].dtype
        self.theta = torch.zeros(pool.size, dtype=torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tuned:
            return self._others[name]
        weight = self._tuned[name]
        return self._pool.rebuild(name, weight, self.theta, out=torch.empty(weight.shape, dtype=self._dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._others)

    def __len__(self) -> int:
        return len(self._others)


class MovedWeights(Mapping[str, Tensor]):
    """``W_r = W_0 + sum_p sum_k theta_{p,k} z_{p,k}`` over the `pools` added so far; W_0 itself until the first.

    Sums are float32, in the order in which pools are added, so W_r does not depend on who adds them, or since when.
    Adding one costs one transform, however many there were before. The sums are in a file that is mapped: the system
    may write them out where memory is short, and the file is gone with the process.
    """

    def __init__(self, base: Mapping[str, Tensor], folder: Path | None = None) -> None:
        self._weights = self._base = base
        self._folder = folder
        self._shapes = {name: base[name].shape for name in base}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._sums = self._incoming = torch.empty(0)
        self._received = 0
        self.pools = 0

    def add(self, pool: Pool, theta: Tensor) -> None:
        """Move the weights to a pool's point."""
        sums = self._sums if self.pools else self._mapped()
        moved = self._views(sums)
        for name in self._base:
            pool.rebuild(name, self._weights[name], theta, out=moved[name])
        self._sums, self._weights = sums, moved
        self.pools += 1

    def reset(self) -> None:
        """Go back to W_0."""
        self._weights, self.pools = self._base, 0

    @property
    def flat(self) -> Tensor:
        """The sums of all tensors one after another, float32; there is none before a pool was added."""
        return self._sums

    def receive(self, start: int, values: Tensor) -> int:
        """Keep the next stretch of another holder's `flat`, and say how much is to come; one from 0 begins again."""
        total = sum(self._sizes)
        if start == 0:
            self._incoming, self._received = self._mapped(), 0
        if values.dtype != torch.float32 or start != self._received or start + values.numel() > total:
            raise ValueError("not the stretch that comes next")
        self._incoming[start : start + values.numel()] = values.flatten()
        self._received += values.numel()
        return total - self._received

    def take_received(self, pools: int) -> None:
        """Hold what was received, in which there are so many pools."""
        self._sums, self._incoming = self._incoming, torch.empty(0)
        self._weights, self.pools = self._views(self._sums), pools

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def _mapped(self) -> Tensor:
        """Make room for every tensor in float32, in a file without a name."""
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            return torch.from_file(file.name, shared=True, size=sum(self._sizes), dtype=torch.float32)

    def _views(self, sums: Tensor) -> dict[str, Tensor]:
        parts = sums.split(self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
