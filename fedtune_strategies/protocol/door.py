"""The door: what comes from outside is checked here before it is recorded, printed, summed or made a path."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fedtune_strategies.errors import FedTuneError, ProtocolError

log = logging.getLogger("fedtune")

M = TypeVar("M")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WHOLE = (-(2**63), 2**63 - 1)  # what Flower's records and a tensor can hold
_RANGES: dict[str, tuple[float, float]] = {
    "num_examples": (1, 10**9),
    "seconds": (0, 10**7),
    "peak_memory": (0, 2**50),
    "steps": (0, 10**9),
    "skipped": (0, 10**9),
    "loss": (-(2.0**128), 2.0**128),  # float32's: a sum over all nodes stays finite
}
_MAY_BE_MISSING = {"loss"}  # not a number where no step had a finite one
_LISTS = {"chunks"}  # a manifest is no line: `model_transfer.read_manifest` checks it


def check_name(text: str) -> str:
    """Return a node's name if it may become a file's name, a unit's and a word on a terminal.

    Raises `ProtocolError`: it is not 1 to 64 letters, digits, dots, dashes and underscores that begin with a letter or
        a digit.
    """
    if not _NAME.fullmatch(text):
        raise ProtocolError(
            f"a node is called {clean(text, 40)!r}: a name is 1 to 64 letters (a to z), digits, dots, dashes and "
            "underscores, and begins with a letter or a digit."
        )
    return text


def clean(text: str, limit: int = 300) -> str:
    """Return text of others as one short line: valid UTF-8 without control characters.

    `limit`: most characters; what is cut off leaves an ellipsis.
    """
    known = text[: limit + 1].encode("utf-8", "replace").decode()
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in known).split())
    return line if len(text) <= limit else f"{line[: limit - 1]}…"


def check_numbers(message: Any) -> None:
    """Refuse a message that holds a number out of range.

    Raises `ProtocolError`: a whole number has more than 64 bits, or one of those that every reply bears is out of its
        range.
    """
    for name, value in vars(message).items():
        if isinstance(value, int | float):
            low, high = _RANGES.get(name, _WHOLE if isinstance(value, int) else (-math.inf, math.inf))
            missing = value != value and (name in _MAY_BE_MISSING or name not in _RANGES)
            if not (low <= value <= high or missing):
                raise ProtocolError(f"received a '{message.kind}' whose {name} is not within {low:g} and {high:g}.")


def admitted(message: M) -> M:
    """Let a decoded message in: names and numbers are checked, other texts become short lines.

    `message`: a frozen dataclass, see `wire.Message`.
    Returns: the message, fit to be recorded and printed.
    Raises `ProtocolError`: a name is none, a number is out of range, or a tensor's name is no short line.
    """
    check_numbers(message)
    lines = {}
    for field in dataclasses.fields(message):  # type: ignore[arg-type]  # every message is a dataclass
        value = getattr(message, field.name)
        if field.name == "node":
            check_name(value)
        elif isinstance(value, str) and field.name not in _LISTS:
            lines[field.name] = clean(value)
        elif isinstance(value, dict) and any(clean(name) != name for name in value):
            raise ProtocolError("received tensors whose names are no short lines of text.")
    return dataclasses.replace(message, **lines)  # type: ignore[type-var]


@contextmanager
def refusing() -> Iterator[None]:
    """Make what a reply raises its node's refusal, never the end of the run.

    Raises `FedTuneError`: as it came.
    Raises `ProtocolError`: anything else, by its type.
    """
    try:
        yield
    except FedTuneError:
        raise
    except Exception as error:
        log.debug("a reply raised", exc_info=True)
        raise ProtocolError(f"its reply cannot be used ({type(error).__name__}): it is left out.") from error
