"""The weights after some rounds of the seed-space gradient, as the server and every node hold them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.errors import FingerprintError
from fedtune_strategies.fedkseed.config import GradientRunConfig
from fedtune_strategies.fedkseed.messages import GradientWeights
from fedtune_strategies.fedkseed.pools import nth_pool
from fedtune_strategies.seed_gradient import packed_bytes
from fedtune_strategies.seed_space import Pool, tensor_fingerprint
from fedtune_strategies.seed_space.moved import MovedWeights
from fedtune_strategies.seed_space.scaled import rms_scales, scaled

log = logging.getLogger("fedtune")

# Measured: one processor core adds a point in so many seconds a parameter, by gaussian directions a parameter and seed.
WALSH_S, GAUSSIAN_S = 1.2e-9, 2.2e-9
LINK = 12.5e6  # bytes a second that a node is thought to receive: 100 Mbit/s
PART = 2**24  # elements: 64 MB


class Moved:
    """W_r: the base model moved by the point of every round's pool, whose directions are as large as the weights."""

    def __init__(self, config: GradientRunConfig, base: Mapping[str, Tensor]) -> None:
        self._config = config
        self._scales = rms_scales(base)
        self._size = sum(tensor.numel() for tensor in base.values())
        self._began = 0.0
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

    def whole_is_less(self, points: int) -> bool:
        """Say whether a node has the weights sooner by receiving them than by so many points."""
        own = self._config.fedkseed
        add = self._size * (WALSH_S if own.pool == "walsh" else GAUSSIAN_S * own.seeds)
        return 4 * self._size / LINK < points * (add + packed_bytes(own.seeds, own.down_bits) / LINK)

    def parts(self) -> Iterator[Callable[[], GradientWeights]]:
        """Cut the weights into messages: yields what makes each."""
        flat, round = self.weights.flat, self.rounds + 1
        whole = tensor_fingerprint(flat)
        for start in range(0, len(flat), PART):
            yield partial(GradientWeights, round, start, flat[start : start + PART], whole)

    def receive(self, part: GradientWeights) -> bool:
        """Take one of `parts`, the last of which completes the weights; says whether it was the one that comes next."""
        if part.start == 0:
            self._began = time.monotonic()
            log.info("receiving the weights after %d rounds, %.0f MB", part.round - 1, 4e-6 * self._size)
        try:
            left = self.weights.receive(part.start, part.values)
        except ValueError:
            return False
        if part.start and left:
            seconds = (time.monotonic() - self._began) / part.start * left
            log.info("%.0f MB of the weights are still to come: about %.0f s", 4e-6 * left, seconds)
        if not left:
            self.weights.take_received(part.round - 1)
            if tensor_fingerprint(self.weights.flat) != part.fingerprint:
                self.weights.reset()
                raise FingerprintError("the weights that came are not the server's: they are not kept.")
        return True

    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Round the weights into a model's parameters."""
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)
