"""The blocks of a model: finding them, coding them for the wire, training one of them.

``find``
    Blocks by module structure.
``codecs``, ``uploads``, ``rest``
    How blocks and changes are coded, what a node's change must look like, which layers a node may do without.
``gradients``, ``train``
    Gradients of one block; AdamW on it; how its result is committed.
``layers``, ``offload``, ``frozen``, ``chunked_matmul``
    What makes that cheap: skipped, remembered and checkpointed layers; frozen weights that stay coded.
"""
