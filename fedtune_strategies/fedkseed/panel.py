"""FedKSeed-Pro's odds on the status page, from the state that the ledger holds after a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune_strategies.fedkseed.config import FedKSeedProRunConfig
from fedtune_strategies.fedkseed.seed_draws import levels, odds_of_levels
from fedtune_strategies.method import Panel


def panel(config: FedKSeedProRunConfig, state: Mapping[str, NDArray[Any]]) -> Panel | None:
    """Say how the next round draws its seeds; None before the first reply."""
    odds = odds_of_levels()[levels(state["sums"], state["count"], config.fedkseed.pro_mean)]
    if not odds.size:
        return None
    p = odds / odds.sum(dtype=np.int64)
    values, counts = np.unique(p, return_counts=True)
    # exp of the entropy: so many equally likely seeds would be as varied.
    effective = float(np.exp(-(p * np.log(p)).sum()))
    return Panel(
        title="How likely the next round draws a seed",
        note=f"{int((state['count'] > 0).sum())} of {odds.size} seeds were drawn so far. The likeliest is "
        f"{values[-1] / values[0]:.2f} times as likely as the unlikeliest; it is as varied as {effective:.0f} equally "
        "likely seeds. Columns: times as likely as under uniform draws.",
        columns=[(f"{value * odds.size:.2f}", float(count)) for value, count in zip(values, counts, strict=True)],
        unit="seeds",
    )
