"""Log lines: for who runs a federation in a script, and for machines, as JSON that names run, round and node."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

from fedtune_strategies.errors import FedTuneError

VARIABLE = "FEDTUNE_LOG"
_facts: ContextVar[dict[str, str | int] | None] = ContextVar("facts", default=None)
_NAMES = ("run", "round", "node")


@contextlib.contextmanager
def about(**facts: str | int) -> Iterator[dict[str, str | int]]:
    """Say what the lines logged within are about: ``run``, ``round`` or ``node``, beside what is said around."""
    token = _facts.set((_facts.get() or {}) | facts)
    try:
        yield _facts.get() or {}
    finally:
        _facts.reset(token)


@contextlib.contextmanager
def script() -> Iterator[None]:
    """Say on standard error what happens within, a line a round; an error of FedTune is a line and the exit code."""
    log, handler = logging.getLogger("fedtune"), json_handler(sys.stderr) or logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except FedTuneError as error:
        sys.stderr.write(f"fedtune: {error}\n")
        raise SystemExit(error.exit_code) from None
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def json_handler(stream: TextIO) -> logging.Handler | None:
    """Return a handler that writes JSON lines, None where ``FEDTUNE_LOG`` does not ask for it."""
    if os.environ.get(VARIABLE) != "json":
        return None
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    return handler


class JsonLines(logging.Formatter):
    """Format a record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time (UTC, ISO 8601), level, message, the facts of `about` or of the record's own, and a trace."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, str | int] = {
            "time": f"{at}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **(_facts.get() or {}),
        }
        line |= {name: getattr(record, name) for name in _NAMES if hasattr(record, name)}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
