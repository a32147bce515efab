"""Local steps whose loss explodes are stopped: what they would send ruins the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune_strategies.errors import DivergenceError

WINDOW = 8
# Nats: four times what the means of so many batches of one example differ by, where examples differ by one nat; of one
# batch alone they differ by twice as much.
MARGIN = 2.0


def check_losses(losses: Sequence[float] | np.ndarray) -> None:
    """Compare the newest losses of local steps with the first; what is not finite is left out.

    They diverge where the mean of the last eight is two nats above that of the first eight, or four above the very
    first.
    """
    known = np.asarray(losses)[np.isfinite(losses)]
    if len(known) < 2 * WINDOW:
        return
    first = min(float(known[:WINDOW].mean()), float(known[0]) + MARGIN)
    last = float(known[-WINDOW:].mean())
    if last > first + MARGIN:
        raise DivergenceError(
            f"the loss rose from {first:.2f} to {last:.2f} nats within {len(known)} local steps, which are left out: "
            "set 'train.lr' lower."
        )
