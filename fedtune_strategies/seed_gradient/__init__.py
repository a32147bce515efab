"""First-order steps in seed space: one backward pass gives the slopes along all K directions of a pool.

``slopes``
    The slopes of a loss, without ever holding the model's gradient.
``walk``
    A node's local steps.
``coding``
    A point of seed space in one to eight bits a coefficient.
``step_size``
    How long a step should be.
"""

from fedtune_strategies.seed_gradient.coding import decode, encode, level_counts, packed_bytes
from fedtune_strategies.seed_gradient.slopes import slopes
from fedtune_strategies.seed_gradient.step_size import default_step
from fedtune_strategies.seed_gradient.walk import LocalWalk, local_walk

__all__ = ["LocalWalk", "decode", "default_step", "encode", "level_counts", "local_walk", "packed_bytes", "slopes"]
