"""Weights that many pools have moved, one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune_strategies.seed_space.pool import Pool


class MovedWeights(Mapping[str, Tensor]):
    """``W_r = W_0 + sum_p sum_k theta_{p,k} z_{p,k}`` over the pools added so far.

    Sums are float32, in the order in which pools are added, so W_r does not depend on who adds them, or since when.
    Adding one costs one transform, however many there were before. The sums are in a file that is mapped: the system
    may write them out where memory is short, and the file is gone with the process.

    Parameters
    ----------
    base : mapping of str to Tensor
        W_0 by canonical name: float32, bfloat16 or float16. Until the first pool is added these are the weights.
    folder : Path, optional
        Where the file is made; the system's folder of temporary files by default.
    """

    def __init__(self, base: Mapping[str, Tensor], folder: Path | None = None) -> None:
        self._weights = self._base = base
        self._folder = folder
        self.pools = 0

    def add(self, pool: Pool, theta: Tensor) -> None:
        """Move the weights to a pool's point.

        Parameters
        ----------
        pool : Pool
            The pool.
        theta : Tensor
            float32, shape (K,).
        """
        moved = self._weights if self.pools else self._mapped()
        for name in self._base:
            pool.rebuild(name, self._weights[name], theta, out=moved[name])
        self._weights = moved
        self.pools += 1

    def reset(self) -> None:
        """Go back to W_0."""
        self._weights, self.pools = self._base, 0

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def _mapped(self) -> dict[str, Tensor]:
        """Make room for every tensor in float32, in a file without a name."""
        sizes = [self._base[name].numel() for name in self._base]
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            storage = torch.from_file(file.name, shared=True, size=sum(sizes), dtype=torch.float32)
        parts = storage.split(sizes)
        return {name: part.view(self._base[name].shape) for name, part in zip(self._base, parts, strict=True)}
