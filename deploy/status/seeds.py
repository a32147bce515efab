"""FedKSeed-Pro's odds, from the state that the ledger holds after a round."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.torch

from fedtune_strategies.config import parse
from fedtune_strategies.errors import FedTuneError
from fedtune_strategies.strategies.fedkseed_pro import FedKSeedPro


def seed_odds(config: dict[str, Any], state: bytes) -> dict[str, Any] | None:
    """Say how the next round draws its seeds.

    Parameters
    ----------
    config : dict
        The flat run config.
    state : bytes
        Blob of a ``round`` record of FedKSeed-Pro.

    Returns
    -------
    dict or None
        ``count`` (K), ``drawn`` (seeds drawn at least once), ``effective`` (exp of the entropy of the odds: as many
        equally likely seeds would be as varied), ``ratio`` (likeliest to unlikeliest), and ``levels``: for every odds
        that occur, how many times as likely as under uniform draws, and how many seeds have them. None where the
        run is of another release.
    """
    try:
        strategy = FedKSeedPro(parse(config), {})
        strategy.restore(safetensors.torch.load(state), lambda label: None)
    except (FedTuneError, KeyError):
        return None
    odds = strategy.odds()
    if not odds.size:
        return None
    p = odds / odds.sum(dtype=np.int64)
    values, counts = np.unique(p, return_counts=True)
    return {
        "count": int(odds.size),
        "drawn": int((strategy.count > 0).sum()),
        "effective": float(np.exp(-(p * np.log(p)).sum())),
        "ratio": float(values[-1] / values[0]),
        "levels": [
            {"times_uniform": float(value * odds.size), "seeds": int(count)}
            for value, count in zip(values, counts, strict=True)
        ],
    }
