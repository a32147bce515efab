"""A turn of FedCyBGD: blocks down, the change of one up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune_strategies.protocol.reply import TrainReply


@dataclass(frozen=True)
class BlockTask:
    """One turn of FedCyBGD for one node, or one part of what the turn needs."""

    kind: ClassVar[str] = "block-task"
    round: int  # turn, from 1
    block: int  # index of the block to train; -1 to only keep the parts
    versions: Tensor  # int64 [D], version of every block after the parts are applied
    # float32 parameters of the block to train, where the node lacks it; in a part, of the one that it trains next
    exact: dict[str, Tensor]
    frozen: dict[str, Tensor]  # coded parameters of frozen blocks that the node lacks
    lr: float  # learning rate of this turn
    dropped: Tensor  # int64, decoder layers that are left out in this turn
    committed: int  # the last turn of this node that was committed, 0 for none


@dataclass(frozen=True)
class BlockReply(TrainReply):
    """What a node answers to a `BlockTask`: the change of one block."""

    kind: ClassVar[str] = "block-reply"
    block: int  # index of the trained block
    base_version: int  # version of the block from which the node started
    delta: dict[str, Tensor]  # change of each parameter of the block, coded as ``train.upload`` says
    steps: int  # optimiser steps that counted
    skipped: int  # steps left out because their loss was not finite
