"""The blocks of a model: finding them, scheduling them, coding them for the wire, training one of them.

``find``
    Blocks by module structure.
``schedule``
    Which block, which node, how many steps: pure functions of (seed, turn).
``codecs``
    What a node receives of the blocks that it does not train.
``train``
    AdamW on one block; how its result is committed.
"""
