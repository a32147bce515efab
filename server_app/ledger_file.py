"""The ledger's file below its records: its format, its chain of hashes, and what to do where it is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune_strategies.errors import LedgerError

FORMAT = 3
# Longer payloads become files: SQLite takes none above a gigabyte, and nobody who reads the rows wants to load them.
INLINE_BYTES = 2**20
_SCHEMA = """
CREATE TABLE records (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL, node TEXT NOT NULL,
    body TEXT NOT NULL, hash BLOB NOT NULL, file TEXT NOT NULL DEFAULT '', blob BLOB NOT NULL
);
CREATE INDEX records_by_kind ON records (kind, round);
"""
_COLUMNS = "seq, time, kind, round, node, body, blob, file, hash"
_Row = tuple[Any, ...]
UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What reading a damaged file raises: the second where SQLite's message quotes bytes that are no text."""

_MOST_UNREADABLE = 1000


@dataclass(frozen=True)
class Damage:
    """Where a ledger stops being what was written."""

    good: int  # records before the damage
    good_after: int  # records behind it that are as they were written
    lost: int  # records that are not
    # All that is there is as it was written: only later records are missing. An end that was lost and an older copy
    # that was put back look alike.
    ends_early: bool = False

    def __str__(self) -> str:
        if self.ends_early:
            return (
                f"ends with record {self.good}, though {self.lost} more had been written: either its end was lost, or "
                "an older copy was put in its place"
            )
        where = f"damaged after record {self.good}" if self.good else "damaged from its first record on"
        after = f", {self.good_after} good ones follow" if self.good_after else ""
        return f"{where} ({self.lost} record{'s' * (self.lost != 1)} lost{after})"


def digest(previous: bytes, at: float, kind: str, round: int, node: str, body: str, blob: bytes, file: str) -> bytes:
    """Return a record's link in the chain of hashes, SHA-256; `previous` is that of the record before, if any.

    It makes no difference whether a payload is in the row or in a file.
    """
    head = json.dumps([at, kind, round, node, body]).encode()
    payload = bytes.fromhex(file) if file else hashlib.sha256(blob).digest()
    return hashlib.sha256(previous + hashlib.sha256(head).digest() + payload).digest()


def find_corruption(path: Path, head: int) -> Damage | None:
    """Check every record of a ledger; `head` is the last record that is known to have been written."""
    with contextlib.closing(_tolerant(path)) as db:
        if path.stat().st_size:  # an empty file has no format
            check_format(db, path)
        good, last = 0, b""
        for row in _readable(db, 0):
            if row[0] != good + 1 or row[-1] != _link(last, row):
                break
            good, last = row[0], row[-1]
        end = max(head, _last_seq(db))
        if good >= end:
            return None
        good_after = _good_after(db, good, end)
        return Damage(good, good_after, end - good - good_after, ends_early=bool(good) and good == _last_seq(db))


def make(path: Path) -> None:
    """Make a new ledger without records; nobody ever sees a part of it."""
    with contextlib.closing(_unfinished(path)):
        pass
    _partial(path).replace(path)
    sync_folder(path.parent)


def truncate_to(path: Path, count: int) -> Path:
    """Write the first records of a damaged ledger to a new file in its place; returns where the damaged one is kept."""
    kept = next(p for n in range(1, 10**6) if not (p := path.with_name(f"ledger.damaged-{n}.sqlite")).exists())
    log = path.with_name(path.name + "-wal")
    with contextlib.closing(_tolerant(path)) as old, contextlib.closing(_unfinished(path)) as new:
        rows = (row for row in _readable(old, 0) if row[0] <= count)
        new.executemany(f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        new.commit()
        # While the damaged file is open nobody folds its log into it: both are kept as they were found.
        shutil.copyfile(path, kept)
        if log.exists():
            shutil.copyfile(log, kept.with_name(kept.name + "-wal"))
    _unlink(log)
    _partial(path).replace(path)
    sync_folder(path.parent)
    return kept


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """Raise `LedgerError` unless the file's format is this release's."""
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found != FORMAT:
        raise LedgerError(f"{path} has format {found}, this FedTune reads {FORMAT}: use the matching release.")


def forget_payloads(db: sqlite3.Connection, kinds: tuple[str, ...], through: int, after: int) -> set[str]:
    """Leave of the payloads of these kinds, up to a round and behind a position, their hashes; returns their names."""
    marks = ", ".join("?" * len(kinds))
    places, values = f"NOT INDEXED WHERE seq > ? AND kind IN ({marks}) AND round <= ?", (after, *kinds, through)
    inline = db.execute(f"SELECT seq, blob FROM records {places} AND file = ''", values)
    hashes = [(hashlib.sha256(blob).hexdigest(), seq) for seq, blob in inline]
    db.executemany("UPDATE records SET file = ?, blob = x'' WHERE seq = ?", hashes)
    return {name for (name,) in db.execute(f"SELECT file FROM records {places}", values)}


def read_head(path: Path) -> int:
    """Return the number of the last record that `note_head` noted, 0 where there is no note."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def note_head(path: Path, seq: int) -> None:
    """Note the last record's number beside the ledger: a chain of hashes does not show that its end is missing.

    It is written in place, and not forced to disk. After a power cut it may be older than the ledger, which does no
    harm.
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{seq:019d}\n".encode())
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make a new or replaced name in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _unfinished(path: Path) -> sqlite3.Connection:
    """Make an empty ledger beside the place where it belongs."""
    _unlink(_partial(path))
    db = sqlite3.connect(_partial(path))
    db.executescript(f"PRAGMA journal_mode = WAL; {_SCHEMA} PRAGMA user_version = {FORMAT};")
    return db


def _tolerant(path: Path) -> sqlite3.Connection:
    # With a writable schema SQLite also opens a file that is shorter than it says, and reads as far as it goes.
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10.0)
    db.execute("PRAGMA writable_schema = ON")
    return db


def _readable(db: sqlite3.Connection, after: int, limit: int = -1) -> Iterator[_Row]:
    """Yield rows in order up to the first that cannot be read."""
    with contextlib.suppress(*UNREADABLE):
        yield from db.execute(f"SELECT {_COLUMNS} FROM records WHERE seq > ? ORDER BY seq LIMIT ?", [after, limit])


def _good_after(db: sqlite3.Connection, good: int, end: int) -> int:
    """Count the records behind a damage that follow from the one before them."""
    count, at, seq, before, misses = 0, good, 0, b"", 0
    while at < end and misses < _MOST_UNREADABLE:
        row = next(_readable(db, at, 1), None)
        if row is None:
            at, misses = at + 1, misses + 1
            continue
        count += row[0] == seq + 1 and row[-1] == _link(before, row)
        at = seq = row[0]
        before = row[-1]
    return count


def _last_seq(db: sqlite3.Connection) -> int:
    with contextlib.suppress(*UNREADABLE):
        return int(db.execute("SELECT max(seq) FROM records").fetchone()[0] or 0)
    return 0


def _link(previous: bytes, row: _Row) -> bytes:
    try:
        return digest(previous, *row[1:-1])
    except (TypeError, ValueError):
        return b""


def _unlink(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
