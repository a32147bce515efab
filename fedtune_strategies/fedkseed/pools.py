"""The subspace in which FedKSeed tunes: the pools of a run, one after another.

With ``fedkseed.pool-every`` = n every n rounds have a pool of their own, and the tuned model is
``W_0 + sum_p sum_k theta_{p,k} z_{p,k}``: it is confined to K directions in each n rounds, not in all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.fedkseed.config import FedKSeedRunConfig, GradientRunConfig
from fedtune_strategies.seed_space import Pool, make_pool
from fedtune_strategies.shared_random import stream


def pool_number(config: FedKSeedRunConfig, round: int) -> int:
    """Return the number of the pool in which a round (from 1) moves, from 0."""
    every = config.fedkseed.pool_every
    return (round - 1) // every if every else 0


def nth_pool(config: FedKSeedRunConfig | GradientRunConfig, number: int) -> Pool:
    """Make one of the run's pools: the first has the run's seed as its key, the others keys derived from it."""
    seed = config.train.seed
    key = int(stream("pool", seed, number).random_raw()) if number else seed
    return make_pool(config.fedkseed.pool, key=key, size=config.fedkseed.seeds)


def rebuild(
    config: FedKSeedRunConfig,
    points: Sequence[NDArray[np.float32]],
    parameters: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> None:
    """Set every parameter to its value at a point of every pool so far, in place.

    Sums are float32 in the order of the pools, rounded to the parameter's dtype once at the end, so the result does not
    depend on who rebuilds, or since when it takes part. Costs one transform for each pool, and the memory of one more
    tensor in float32.
    """
    before, last, point = BeforeLast(config, points, base, base), nth_pool(config, len(points) - 1), points[-1]
    for name, parameter in parameters.items():
        last.rebuild(name, before[name].to(parameter.device), torch.from_numpy(point), out=parameter.detach())


class BeforeLast(Mapping[str, Tensor]):
    """W_0 moved to the points of all pools but the last, each tensor made when it is asked for; see `rebuild`.

    In float32 where there is such a pool and the tensor is tuned; otherwise W_0 as it is.
    """

    def __init__(
        self,
        config: FedKSeedRunConfig,
        points: Sequence[NDArray[np.float32]],
        base: Mapping[str, Tensor],
        tuned: Collection[str],
    ) -> None:
        self._base, self._tuned = base, tuned
        self._closed = [(nth_pool(config, n), torch.from_numpy(point)) for n, point in enumerate(points[:-1])]

    def __getitem__(self, name: str) -> Tensor:
        value = self._base[name]
        if not self._closed or name not in self._tuned:
            return value
        value = value.to(torch.float32, copy=True)
        for pool, theta in self._closed:
            pool.rebuild(name, value, theta, out=value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
