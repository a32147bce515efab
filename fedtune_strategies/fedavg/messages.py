"""A round of a method whose global model is a set of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


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
class ArraysReply:
    """What a node answers to an `ArraysTask`: the tensors as its local training left them.

    Attributes
    ----------
    node : str
        Name of the node.
    round : int
        Round of the task.
    arrays : dict of str to Tensor
        Same names and shapes as in the task, if the method does not say otherwise.
    loss : float
        Mean training loss over the finite steps, nats a token.
    skipped : int
        Steps left out because their loss was not finite.
    fingerprint : str
        Fingerprint of the weights on which the node started.
    num_examples : int
        Training examples that the node holds.
    seconds : float
        Wall-clock time of the task on the node.
    peak_memory : int
        Peak resident memory of the worker so far, in bytes.
    """

    kind: ClassVar[str] = "arrays-reply"
    node: str
    round: int
    arrays: dict[str, Tensor]
    loss: float
    skipped: int
    fingerprint: str
    num_examples: int
    seconds: float
    peak_memory: int
