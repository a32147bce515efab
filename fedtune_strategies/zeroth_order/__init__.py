"""Zeroth-order steps along seed-space directions."""

from fedtune_strategies.zeroth_order.layerwise import at_point
from fedtune_strategies.zeroth_order.steps import LocalSteps, check_steps, local_steps

__all__ = ["LocalSteps", "at_point", "check_steps", "local_steps"]
