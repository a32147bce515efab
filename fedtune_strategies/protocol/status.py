"""What a node says instead of a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Ack:
    """The node has taken up what a task brought; the task asked for no result."""

    kind: ClassVar[str] = "ack"
    node: str
    round: int


@dataclass(frozen=True)
class StateMissing:
    """The node does not hold what the task builds on (its worker was restarted): it holds the base model alone."""

    kind: ClassVar[str] = "state-missing"
    node: str
    round: int


@dataclass(frozen=True)
class Failure:
    """A node's error, as one line for the operator."""

    kind: ClassVar[str] = "failure"
    exit_code: int  # exit code of the `fedtune_strategies.errors` class
    message: str
