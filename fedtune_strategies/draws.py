"""Random choices that both sides of the network make alike, from keys alone.

Only raw Philox output is used and turned into choices by integer arithmetic, so a draw is the same on every
machine and with every release of NumPy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune_strategies.config import Config
from fedtune_strategies.config.sections import COMPARED

# Keeps the sum of the odds of 2**20 seeds within 32 bits.
MAX_ODDS = 4095
# A seed's odds are one of so many: 4 bits a seed on the wire, each within 1/30 of a softmax's range.
LEVELS = 16


def stream(*key: int | str) -> np.random.Philox:
    """Open the random stream that belongs to a key.

    Parameters
    ----------
    *key : int or str
        For example run seed, purpose, round and node.

    Returns
    -------
    numpy.random.Philox
        A bit generator; take its ``random_raw``.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()
    words = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype="<u8")
    return np.random.Philox(key=words)


def seed_key(config: Config, round: int, node: str) -> tuple[int | str, ...]:
    """Return the key of a node's draws in a round, for `draw_seeds`.

    Parameters
    ----------
    config : Config
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


def odds_of_levels(temperature: float) -> NDArray[np.int16]:
    """Return the odds of each level: a softmax over [0, 1] in `LEVELS` equal steps.

    Parameters
    ----------
    temperature : float
        The likeliest seed is exp(1 / temperature) times as likely as the unlikeliest.

    Returns
    -------
    ndarray of int16, shape [LEVELS]
        From at least 1 to `MAX_ODDS`.
    """
    steps = np.arange(LEVELS) / (LEVELS - 1)
    return np.maximum(1, np.rint(MAX_ODDS * np.exp((steps - 1.0) / temperature))).astype(np.int16)


def importance(odds: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return the weight 1 / (K p) of each seed: with it, steps along drawn seeds are unbiased whatever the odds are.

    Parameters
    ----------
    odds : ndarray of int16, shape [K]
        Relative odds of each seed.

    Returns
    -------
    ndarray of float64, shape [K]
        Weights; their mean under the odds is 1.
    """
    return odds.sum(dtype=np.int64) / (odds.size * odds.astype(np.float64))


def sample(key: Sequence[int | str], names: Sequence[str], count: int) -> list[str]:
    """Choose names without repetition.

    Parameters
    ----------
    key : sequence of int or str
        Run seed and round.
    names : sequence of str
        The candidates; their order does not matter.
    count : int
        How many to choose, at most ``len(names)``.

    Returns
    -------
    list of str
        The chosen names, sorted.
    """
    ranked = sorted(names, key=lambda name: int(stream("sample", *key, name).random_raw()))
    return sorted(ranked[:count])
