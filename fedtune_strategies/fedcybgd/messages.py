"""A turn of FedCyBGD: blocks down, the change of one up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune_strategies.protocol.reply import TrainReply


@dataclass(frozen=True)
class BlockTask:
    """One turn of FedCyBGD for one node, or one part of what the turn needs.

    Attributes
    ----------
    round : int
        Turn, from 1.
    block : int
        Index of the block to train; -1 to only keep the parts.
    versions : Tensor
        int64 [D], version of every block after the parts are applied.
    exact : dict of str to Tensor
        float32 parameters of the block to train, where the node lacks it; in a part, of the one that it trains next.
    frozen : dict of str to Tensor
        Coded parameters of frozen blocks that the node lacks.
    lr : float
        Learning rate of this turn.
    dropped : Tensor
        int64, decoder layers that are left out in this turn.
    committed : int
        The last turn of this node that was committed, 0 for none.
    """

    kind: ClassVar[str] = "block-task"
    round: int
    block: int
    versions: Tensor
    exact: dict[str, Tensor]
    frozen: dict[str, Tensor]
    lr: float
    dropped: Tensor
    committed: int


@dataclass(frozen=True)
class BlockReply(TrainReply):
    """What a node answers to a `BlockTask`: the change of one block.

    Attributes
    ----------
    block : int
        Index of the trained block.
    base_version : int
        Version of the block from which the node started.
    delta : dict of str to Tensor
        Change of each parameter of the block, coded as ``train.upload`` says.
    steps : int
        Optimiser steps that counted.
    skipped : int
        Steps left out because their loss was not finite.
    """

    kind: ClassVar[str] = "block-reply"
    block: int
    base_version: int
    delta: dict[str, Tensor]
    steps: int
    skipped: int
