"""What a node says instead of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Lacking:
    """A node does not hold what the task counts on (its worker was restarted): it holds the base model alone."""

    kind: ClassVar[str] = "lacking"
    node: str
    round: int


@dataclass(frozen=True)
class Failure:
    """A node's error, as one line for the operator.

    Attributes
    ----------
    exit_code : int
        Exit code of the `fedtune_strategies.errors` class.
    message : str
        The line.
    """

    kind: ClassVar[str] = "failure"
    exit_code: int
    message: str
