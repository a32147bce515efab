"""The blocks of a model: finding them, scheduling them, coding them for the wire, training one of them.

``find``
    Blocks by module structure.
``schedule``
    Which block, which node, how many steps: pure functions of (seed, turn).
``codecs``
    What a node receives of the blocks that it does not train.
``rest``
    Which layers to drop and weights to prune, and what compression does to a block's gradient.
``gradients``, ``train``
    Gradients of one block; AdamW on it; how its result is committed.
``layers``, ``held``
    What makes that cheap: skipped, remembered and checkpointed layers; frozen weights that stay coded in memory.
``exchange``
    What server and node compute alike.
"""
