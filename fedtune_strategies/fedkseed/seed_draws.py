"""Which seed each local step of FedKSeed takes: both sides of the network draw alike, from keys alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune_strategies.fedkseed.config import COMPARED, FedKSeedRunConfig
from fedtune_strategies.shared_random import stream

# Keeps the sum of the odds of 2**20 seeds within 32 bits.
MAX_ODDS = 4095
# A seed's odds are one of so many: 4 bits a seed on the wire, each within 1/30 of a softmax's range.
LEVELS = 16


def seed_key(config: FedKSeedRunConfig, round: int, node: str) -> tuple[int | str, ...]:
    """Return the key of a node's draws in a round, for `draw_seeds`.

    Parameters
    ----------
    config : FedKSeedRunConfig
        The run configuration.
    round : int
        The round.
    node : str
        The node's name.

    Returns
    -------
    tuple of int or str
        Run seed, round and name; without the name where replies are compared with each other seed by seed.
    """
    compared = config.strategy.aggregation in COMPARED
    return (config.train.seed, round) if compared else (config.train.seed, round, node)


def draw_seeds(key: Sequence[int | str], steps: int, num_seeds: int, weights: NDArray[np.int16]) -> NDArray[np.int64]:
    """Draw the seed of each local step of FedKSeed.

    Parameters
    ----------
    key : sequence of int or str
        From `seed_key`.
    steps : int
        tau, the number of draws.
    num_seeds : int
        K.
    weights : ndarray of int16, shape [K] or [0]
        Relative odds of each seed, at most `MAX_ODDS` (FedKSeed-Pro, arXiv 2312.06353); empty for uniform draws.

    Returns
    -------
    ndarray of int64, shape [steps]
        Seeds in [0, K).
    """
    odds = weights.astype(np.uint64) if weights.size else np.ones(num_seeds, dtype=np.uint64)
    cumulated = np.cumsum(odds, dtype=np.uint64)
    # The high half of a 32 x 32 bit product maps 32 random bits onto [0, total) with integers alone.
    bits = stream("seeds", *key).random_raw(steps) >> np.uint64(32)
    points = (bits * cumulated[-1]) >> np.uint64(32)
    return np.searchsorted(cumulated, points, side="right").astype(np.int64)


def odds_of_levels() -> NDArray[np.int16]:
    """Return the odds of each level: a softmax over [0, 1] in `LEVELS` equal steps.

    Returns
    -------
    ndarray of int16, shape [LEVELS]
        From about `MAX_ODDS` / e to `MAX_ODDS`: the likeliest seed is e times as likely as the unlikeliest.
    """
    steps = np.arange(LEVELS) / (LEVELS - 1)
    return np.rint(MAX_ODDS * np.exp(steps - 1.0)).astype(np.int16)
