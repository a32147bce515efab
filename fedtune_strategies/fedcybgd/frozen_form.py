"""What the server and a node must compute alike so that a turn has one result.

A frozen block is always used in its coded form C(W), whether a node received it, made it from the base model, or
trained it itself: what a node computes depends on the versions of the blocks alone, never on how it got them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.blocks.codecs import decode, encode


def frozen_form(weights: Mapping[str, Tensor], codec: Codec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a block, one at a time, as they take part in a turn in which it is not trained.

    `codec`: coding of the frozen rest.
    `dtype`: type of the node's model.
    """
    for name, weight in weights.items():
        yield name, decode(encode({name: weight}, codec))[name].to(dtype)


def turn_fingerprint(blocks: Iterable[str]) -> str:
    """Combine the blocks' fingerprints, in the order of the blocks, into that of a turn's starting weights."""
    return hashlib.blake2b(" ".join(blocks).encode(), digest_size=8).hexdigest()
