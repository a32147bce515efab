"""A node's own record: what its owner agreed to, what was refused, and all that left; appended to, never changed.

One JSON line an event, in ``history.jsonl`` in the node's folder, which its owner alone can read. What cannot be
written there does not leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client_app.terms import Agreement, Spent
from fedtune_strategies.config import Scalar
from fedtune_strategies.config.node import FIRST, Terms

FILE = "history.jsonl"
AGREED, REFUSED, MODEL, LEFT = "agreed", "refused", "model", "left"
_LARGEST_CONFIG = 2**16  # characters; what an operator sets beyond that is not kept, so it cannot be agreed to

Row = dict[str, Any]


class History:
    """The record of a node.

    `folder`: the node's folder, made where absent; None keeps the record in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file = folder / FILE if folder else None
        self._rows: list[Row] = []
        self._agreed = 0  # where the newest agreement is among them
        self._rounds: set[tuple[str, int]] = set()  # of which results have left since then
        self._results = 0
        self._read = 0
        if folder:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def rows(self) -> list[Row]:
        """Every event, oldest first; others may have appended some."""
        if self._file and self._file.exists():
            # A link could lead to a file without end.
            with os.fdopen(os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
                stream.seek(self._read)
                whole = stream.read().rpartition(b"\n")[0]
            self._read += len(whole) + 1 if whole else 0
            for row in filter(None, map(_row, whole.splitlines())):
                self._take(row)
        return self._rows

    def append(self, event: str, **facts: Any) -> None:
        """Write one event; `OSError` where it cannot be written."""
        row = {"event": event, "time": round(time.time(), 3), **facts}
        if self._file is None:
            self._take(row)
            return
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "r+b", buffering=0) as stream:
            # A line that a power cut left half is closed, so that it spoils no other.
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            stream.write(b"\n" * torn + json.dumps(row).encode() + b"\n")

    def agree(self, agreement: Agreement) -> None:
        """Write down what the owner agrees to; it takes the place of what was agreed before."""
        self.append(AGREED, terms=asdict(agreement.terms), settings=dict(agreement.settings))

    def agreement(self, otherwise: Terms) -> Agreement:
        """What the owner agreed to last; where nothing is written, the terms of the node's configuration."""
        rows = self.rows()
        if not rows or rows[self._agreed]["event"] != AGREED:
            return Agreement(otherwise)
        return Agreement(Terms(**rows[self._agreed]["terms"]), rows[self._agreed]["settings"])

    def spent(self) -> Spent:
        """What has left since then that tells something about the data."""
        self.rows()
        return Spent(frozenset(self._rounds), self._results)

    def model(self, agreed: str) -> str:
        """The fingerprint that the base model must have; empty where any, or the first, will do."""
        if agreed != FIRST:
            return agreed
        kept = [row["fingerprint"] for row in self._since_agreed() if row["event"] == MODEL]
        return kept[0] if kept else ""

    def refuse(self, config: Mapping[str, Scalar], run: str, reasons: list[str]) -> None:
        """Write down that a run was refused, once until something about it changes."""
        kept = dict(config) if len(json.dumps(dict(config))) <= _LARGEST_CONFIG else {}
        waiting = self.waiting()
        if waiting is None or (waiting["config"], waiting["reasons"]) != (kept, reasons):
            self.append(REFUSED, run=run, config=kept, reasons=reasons)

    def waiting(self) -> Row | None:
        """The run that was refused last, unless the owner has agreed to another since."""
        refused = [row for row in self._since_agreed() if row["event"] == REFUSED]
        return refused[-1] if refused else None

    def key(self) -> str:
        """The node's own key for the order of batches, made once; empty for a record in memory."""
        if self._folder is None:
            return ""
        file, draft = self._folder / "draw.key", self._folder / f".draw.key.{os.getpid()}"
        if not file.exists():
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):
                os.link(draft, file)
            draft.unlink()
        return file.read_text()

    def _take(self, row: Row) -> None:
        """Take up one event: each task asks what was agreed to and spent, so that is not counted again each time."""
        if row["event"] == AGREED:
            self._agreed, self._rounds, self._results = len(self._rows), set(), 0
        elif row["event"] == LEFT and row.get("result"):
            self._rounds.add((row["run"], row["round"]))
            self._results += 1
        self._rows.append(row)

    def _since_agreed(self) -> list[Row]:
        return self.rows()[self._agreed :]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) and "event" in row else None
    except ValueError:
        return None
