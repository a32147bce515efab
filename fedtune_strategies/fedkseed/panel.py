"""What the status page shows of seed space, from the state that the ledger holds after a round."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune_strategies.fedkseed.config import FedKSeedProRunConfig, FedKSeedRunConfig, GradientRunConfig
from fedtune_strategies.fedkseed.seed_draws import levels, odds_of_levels
from fedtune_strategies.method import Panel


def panel(config: FedKSeedRunConfig | GradientRunConfig, state: Mapping[str, NDArray[Any]]) -> Panel | None:
    """Return FedKSeed-Pro's odds or the gradient's newest point; None where there is none."""
    if isinstance(config, GradientRunConfig):
        return _point(state["point/counts"], float(state["point/unit"]), float(state["point/kept"]))
    return _odds(config, state) if isinstance(config, FedKSeedProRunConfig) else None


def _point(counts: NDArray[np.int64], unit: float, kept: float) -> Panel | None:
    """Say how far the last round moved the model, and by which coefficients."""
    levels = np.arange(counts.size) - counts.size // 2 + 0.5
    move = unit * sqrt(float(counts @ np.square(levels)))
    if not move:
        return None
    return Panel(
        title="Coefficients of the newest round's point",
        note=f"It moved the weights by {move:.2%} of their root mean square. Rounding to {counts.size} levels, "
        f"{unit:.2g} apart, kept {kept:.1%} of the energy of the nodes' mean.",
        columns=[(f"{level:+g}", float(count)) for level, count in zip(levels, counts, strict=True)],
        unit="directions",
    )


def _odds(config: FedKSeedProRunConfig, state: Mapping[str, NDArray[Any]]) -> Panel | None:
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
