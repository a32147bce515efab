"""A round of a method whose global model is a set of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune_strategies.protocol.reply import TrainReply


@dataclass(frozen=True)
class ArraysTask:
    """One round of a method whose global model is a set of tensors: FedAvg, or a method of another package.

    Attributes
    ----------
    round : int
        Round, from 1.
    arrays : dict of str to Tensor
        The global model.
    lr : float
        Step size of this round.
    """

    kind: ClassVar[str] = "arrays-task"
    round: int
    arrays: dict[str, Tensor]
    lr: float


@dataclass(frozen=True)
class ArraysReply(TrainReply):
    """What a node answers to an `ArraysTask`: how its local training changed the tensors.

    Attributes
    ----------
    arrays : dict of str to Tensor
        Change of each tensor, coded as ``train.upload`` says, if the method does not say otherwise.
    skipped : int
        Steps left out because their loss was not finite.
    """

    kind: ClassVar[str] = "arrays-reply"
    arrays: dict[str, Tensor]
    skipped: int


@dataclass(frozen=True)
class ZerothReply(ArraysReply):
    """What a node answers after zeroth-order steps.

    Attributes
    ----------
    lr : float
        Step size that it took: the task's, or the one that it found.
    """

    kind: ClassVar[str] = "zeroth-reply"
    lr: float
