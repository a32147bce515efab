"""Zeroth-order steps along seed-space directions."""

from fedtune_strategies.zeroth_order.steps import LocalSteps, local_steps

__all__ = ["LocalSteps", "local_steps"]
