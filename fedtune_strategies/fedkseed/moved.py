"""The weights after some rounds of the seed-space gradient, as the server and every node hold them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.fedkseed.config import GradientRunConfig
from fedtune_strategies.fedkseed.pools import nth_pool
from fedtune_strategies.seed_space import Pool
from fedtune_strategies.seed_space.moved import MovedWeights
from fedtune_strategies.seed_space.scaled import rms_scales, scaled

log = logging.getLogger("fedtune")


class Moved:
    """W_r: the base model moved by the point of every round's pool, whose directions are as large as the weights.

    Parameters
    ----------
    config : GradientRunConfig
        The run configuration.
    base : mapping of str to Tensor
        W_0 of the tuned parameters by canonical name.
    """

    def __init__(self, config: GradientRunConfig, base: Mapping[str, Tensor]) -> None:
        self._config = config
        self._scales = rms_scales(base)
        self.weights = MovedWeights(base)

    @property
    def rounds(self) -> int:
        """Rounds whose points are in the weights."""
        return self.weights.pools

    def pool(self, round: int) -> Pool:
        """Return the scaled pool of a round, from 1."""
        return scaled(nth_pool(self._config, round - 1), self._scales)

    def follow(self, points: Sequence[NDArray[np.float32]]) -> None:
        """Move on by the next rounds' points; where they are many, say how long that will take."""
        start = time.monotonic()
        for done, theta in enumerate(points, start=1):
            self.weights.add(self.pool(self.rounds + 1), torch.from_numpy(theta))
            if done == 1 and len(points) > 1:
                left = (len(points) - 1) * (time.monotonic() - start)
                log.info("moving the base model by the points of %d rounds: about %.0f s left", len(points), left)

    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Round the weights into a model's parameters."""
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)
