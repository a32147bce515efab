"""How long a step in seed space should be."""

from __future__ import annotations

# Measured at K = 16384: about 1 % of the weights' root mean square was best at 0.26 and at 2.1 million parameters,
# 0.25 % at 135 million; twice as much at K = 1024, half at 262144. docs/LOG.md has the searches.
SMALL = 0.01
SIZE, SIZE_POWER = 2.1e6, 1 / 3
SEEDS, SEEDS_POWER = 16384, 1 / 4


def default_step(parameters: int, seeds: int) -> float:
    """Return the share of their root mean square by which a step should change so many weights, with so many seeds."""
    return SMALL * min(1.0, SIZE / parameters) ** SIZE_POWER * (SEEDS / seeds) ** SEEDS_POWER
