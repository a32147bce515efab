"""Errors that a user can act on: one line each, with its own exit code.

Every message says what is wrong, where, and what to do next. Anything else that is raised is a defect of FedTune.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FOLDERS = re.compile(r"(?<![\w.:/])[~.]{0,2}/(?:[^\s/:;,'\"()]+/)*")


class FedTuneError(Exception):
    """Base of all errors that are shown to a user as one line.

    Attributes
    ----------
    exit_code : int
        Exit code of a command that ends with this error; also travels in error replies.
    public : str
        The line that may leave the machine: names of files without their folders.
    """

    exit_code = 1
    facts: Mapping[str, str | int] = {}  # what a run's record holds beside the line

    @property
    def public(self) -> str:  # noqa: D102
        return _FOLDERS.sub("", str(self))


class ConfigError(FedTuneError):
    """An unknown key, a wrong type or a value out of range in a configuration."""

    exit_code = 10


class DataError(FedTuneError):
    """A data file is missing, empty, malformed or has the wrong columns.

    Parameters
    ----------
    line : str
        For the owner: may name files and quote their text.
    public : str
        For others: holds nothing of the data.
    """

    exit_code = 11

    def __init__(self, line: str, public: str = "") -> None:
        super().__init__(line)
        self._public = public

    @property
    def public(self) -> str:
        """Say what is wrong without the owner's text or paths."""
        return self._public or "the owner's data cannot be used as they are; the line is in the node's log"


class ModelError(FedTuneError):
    """A model folder cannot be loaded, or its tokenizer is unusable."""

    exit_code = 12


class ResourceError(FedTuneError):
    """Not enough memory or disk space."""

    exit_code = 13


class NodesError(FedTuneError):
    """No nodes, too few nodes, or no usable reply by the deadline."""

    exit_code = 14


class FingerprintError(FedTuneError):
    """Two holders of "the same" weights hold different ones."""

    exit_code = 15


class LedgerError(FedTuneError):
    """A ledger cannot be opened, is damaged, or belongs to another run."""

    exit_code = 16


class PortError(FedTuneError):
    """A port is in use or an address cannot be bound."""

    exit_code = 17


class LinkError(FedTuneError):
    """A SuperLink, SuperNode or worker cannot be reached, or refused."""

    exit_code = 18


class ProtocolError(FedTuneError):
    """A message is malformed, from another version, or not meant for its receiver."""

    exit_code = 19


class RunError(FedTuneError):
    """A run ended without a model for a reason that is none of the above."""

    exit_code = 20


class DivergenceError(FedTuneError):
    """Tuning makes the model worse, or has left no finite number in it."""

    exit_code = 21

    def __init__(self, line: str, facts: Mapping[str, str | int] | None = None) -> None:
        super().__init__(line)
        self.facts = facts or {}


class TermsError(FedTuneError):
    """A run asks for more than the owner of a node agreed to."""

    exit_code = 22


def error_from_code(exit_code: int, message: str) -> FedTuneError:
    """Rebuild an error that travelled as (exit code, message)."""
    classes = {cls.exit_code: cls for cls in FedTuneError.__subclasses__()}
    return classes.get(exit_code, FedTuneError)(message)
