"""How long a step in seed space should be."""

from __future__ import annotations


def default_step(parameters: int, seeds: int) -> float:
    """Root mean square by which a step changes the weights, as a share of theirs."""
    return 0.01 * min(1.0, (2.1e6 / parameters) ** (1 / 3))
