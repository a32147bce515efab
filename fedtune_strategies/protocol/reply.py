"""What every method's reply to a training task says beside what was learnt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainReply:
    """The fields that the server reads of any method's reply; a method's own reply adds what it learnt.

    Attributes
    ----------
    node : str
        Name of the node.
    round : int
        Round of the task.
    loss : float
        Mean training loss over the finite steps, nats a token; not a number where there is none.
    fingerprint : str
        Fingerprint of the weights on which the node started.
    num_examples : int
        Training examples that the node holds.
    seconds : float
        Wall-clock time of the task on the node.
    peak_memory : int
        Peak memory of the worker so far in bytes, without mapped files.
    """

    node: str
    round: int
    loss: float
    fingerprint: str
    num_examples: int
    seconds: float
    peak_memory: int
