"""Which seed each local step of FedKSeed takes: both sides of the network draw alike, from keys alone.

A node's key holds a secret, which it tells the server with its scalars. The server adds up the nodes' scalars, and
other nodes see the sums: without the secret they cannot tell whose scalar stands on which seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedkseed.config import COMPARED, FedKSeedRunConfig
from fedtune_strategies.shared_random import stream

_SECRET = re.compile(r"[0-9a-f]{32}")
# Keeps the sum of the odds of 2**20 seeds within 32 bits.
MAX_ODDS = 4095
# A seed's odds are one of so many: 4 bits a seed on the wire, each within 1/30 of a softmax's range.
LEVELS = 16


def compared(config: FedKSeedRunConfig) -> bool:
    """Whether replies are compared with each other seed by seed, so that all nodes draw the same seeds."""
    return config.strategy.aggregation in COMPARED


def seed_key(config: FedKSeedRunConfig, round: int, node: str, secret: str = "") -> tuple[int | str, ...]:
    """Return the key of a node's draws in a round, for `draw_seeds`.

    `secret`: what the node and the server know alone; empty where everybody may know the draws.
    Returns: run seed and round; and name and secret, unless all nodes draw the same seeds.
    """
    if compared(config):
        return config.train.seed, round
    return (config.train.seed, round, node, *([secret] if secret else []))


def check_secret(secret: str) -> None:
    """Refuse a secret that `NodeContext.secret` does not make.

    Raises `ProtocolError`: it is neither empty nor 32 hexadecimal digits.
    """
    if secret and not _SECRET.fullmatch(secret):
        raise ProtocolError("the key of its draws is not 32 hexadecimal digits: the reply is left out.")


def draw_seeds(key: Sequence[int | str], steps: int, num_seeds: int, weights: NDArray[np.int16]) -> NDArray[np.int64]:
    """Draw the seed of each local step of FedKSeed.

    `steps`: tau, the number of draws.
    `weights`: relative odds of each seed, at most `MAX_ODDS` (FedKSeed-Pro, arXiv 2312.06353); empty for uniform draws.
    """
    odds = weights.astype(np.uint64) if weights.size else np.ones(num_seeds, dtype=np.uint64)
    cumulated = np.cumsum(odds, dtype=np.uint64)
    # The high half of a 32 x 32 bit product maps 32 random bits onto [0, total) with integers alone.
    bits = stream("seeds", *key).random_raw(steps) >> np.uint64(32)
    points = (bits * cumulated[-1]) >> np.uint64(32)
    return np.searchsorted(cumulated, points, side="right").astype(np.int64)


def mean_amplitude(sums: NDArray[np.float64], count: NDArray[np.int64], mean: str) -> NDArray[np.float64]:
    """Return Lambda, the mean absolute scalar of each seed, float64 [K]; see `FedKSeedPro` for the two means."""
    if mean == "faithful":
        return sums / (count + 1)
    drawn = count > 0
    unseen = sums[drawn].sum() / count[drawn].sum()
    return np.where(drawn, sums / np.maximum(count, 1), unseen)


def levels(sums: NDArray[np.float64], count: NDArray[np.int64], mean: str) -> NDArray[np.int32]:
    """Return which of the odds each seed has by its history, int32 [K]; empty before the first reply."""
    if not count.any():
        return np.empty(0, dtype=np.int32)
    amplitude = mean_amplitude(sums, count, mean)
    span = amplitude.max() - amplitude.min()
    scaled = (amplitude - amplitude.min()) / span if span > 0 else np.zeros_like(amplitude)
    return np.rint((LEVELS - 1) * scaled).astype(np.int32)


def odds_of_levels() -> NDArray[np.int16]:
    """Return the odds of each level: a softmax over [0, 1] in `LEVELS` equal steps.

    Returns: from about `MAX_ODDS` / e to `MAX_ODDS`: the likeliest seed is e times as likely as the unlikeliest.
    """
    steps = np.arange(LEVELS) / (LEVELS - 1)
    return np.rint(MAX_ODDS * np.exp(steps - 1.0)).astype(np.int16)
