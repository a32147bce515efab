"""The ledger: the append-only record of a run, its checkpoint, its audit log and the source of every report.

One SQLite file in WAL mode holds one row per event; the rows form a hash chain, so a damaged row is found. Large
parts (a block's weights) are immutable safetensors files named by their hash, written before the row that names
them. The state of a run is a fold over the rows: whatever is killed at any moment, the next start continues from
the last committed row.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from fedtune_strategies.errors import LedgerError, ResourceError

FORMAT = 1
_SCHEMA = """
CREATE TABLE records (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL, node TEXT NOT NULL,
    body TEXT NOT NULL, blob BLOB NOT NULL, hash BLOB NOT NULL
);
CREATE INDEX records_by_kind ON records (kind, round);
"""


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes
    ----------
    seq : int
        Position in the ledger, from 1.
    time : float
        Seconds since the epoch, UTC.
    kind : str
        ``start``, ``joined``, ``refused``, ``lost``, ``reply``, ``round``, ``evaluation``, ``export``, ``failed`` or
        ``finished``.
    round : int
        Round, 0 outside one.
    node : str
        Name of the node, empty where none is concerned.
    body : dict
        The event's facts, as JSON.
    blob : bytes
        The event's payload, such as an encoded reply.
    """

    seq: int
    time: float
    kind: str
    round: int
    node: str
    body: dict[str, Any]
    blob: bytes


class Ledger:
    """Open a run's ledger.

    Parameters
    ----------
    folder : Path
        Folder of the run; made where absent.
    writable : bool
        Take the writer's lock. A reader may follow while another process writes.

    Raises
    ------
    LedgerError
        Another process writes this ledger, it is no ledger, it is damaged, or of a newer format.
    ResourceError
        The disk is full or read-only.
    """

    def __init__(self, folder: Path, *, writable: bool = True) -> None:
        self.folder = folder
        self._path = folder / "ledger.sqlite"
        self._lock = FileLock(folder / "ledger.lock", timeout=0)
        if not writable and not self._path.exists():
            raise LedgerError(f"no ledger in {folder}: check 'run.dir'.")
        try:
            if writable:
                folder.mkdir(parents=True, exist_ok=True)
                self._take_lock()
            self._db = self._open(writable)
            self._hash = self._verify() if writable else b""
        except sqlite3.DatabaseError as error:
            raise self._sqlite_error(error) from None
        except OSError as error:
            raise ResourceError(
                f"{folder}: {error.strerror or error}; choose another 'run.dir' or free space."
            ) from None

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Open for reading alone, while another process may write."""
        return cls(folder, writable=False)

    def close(self) -> None:
        """Close the file and give the writer's lock back."""
        self._db.close()
        self._lock.release()

    def append(
        self, kind: str, *, round: int = 0, node: str = "", body: dict[str, Any] | None = None, blob: bytes = b""
    ) -> Record:
        """Append one record; it is on disk when this returns.

        Raises
        ------
        ResourceError
            The disk is full or read-only; the ledger is as before.
        """
        text = json.dumps(body or {}, sort_keys=True, separators=(",", ":"))
        now = time.time()
        digest = _digest(self._hash, now, kind, round, node, text, blob)
        try:
            cursor = self._db.execute(
                "INSERT INTO records (time, kind, round, node, body, blob, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (now, kind, round, node, text, blob, digest),
            )
        except sqlite3.DatabaseError as error:
            raise self._sqlite_error(error) from None
        self._hash = digest
        return Record(int(cursor.lastrowid or 0), now, kind, round, node, json.loads(text), blob)

    def records(self, kind: str | None = None, *, round: int | None = None, after: int = 0) -> Iterator[Record]:
        """Yield records in order.

        Parameters
        ----------
        kind : str, optional
            Only this kind.
        round : int, optional
            Only this round.
        after : int
            Only records behind this position.
        """
        query = "SELECT seq, time, kind, round, node, body, blob FROM records WHERE seq > ?"
        values: list[Any] = [after]
        for column, value in (("kind", kind), ("round", round)):
            if value is not None:
                query += f" AND {column} = ?"
                values.append(value)
        for row in self._db.execute(query + " ORDER BY seq", values):
            yield _record(row)

    def last(self, kind: str) -> Record | None:
        """Return the newest record of a kind, None where there is none."""
        query = "SELECT seq, time, kind, round, node, body, blob FROM records WHERE kind = ? ORDER BY seq DESC LIMIT 1"
        row = self._db.execute(query, (kind,)).fetchone()
        return _record(row) if row else None

    def put_file(self, tensors: dict[str, Tensor]) -> str:
        """Store tensors as an immutable safetensors file; returns the SHA-256 of its bytes, which is its name.

        Raises
        ------
        ResourceError
            The disk is full or read-only; nothing is left behind.
        """
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        name = hashlib.sha256(data).hexdigest()
        path = self._file(name)
        if path.exists():
            return name
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ResourceError(
                f"cannot write {path}: {error.strerror}; free space, then start the run again."
            ) from None
        return name

    def get_file(self, name: str) -> dict[str, Tensor]:
        """Load a stored file.

        Raises
        ------
        LedgerError
            The file is missing or its bytes are not those that were stored.
        """
        try:
            data = self._file(name).read_bytes()
        except OSError as error:
            raise LedgerError(f"{self._file(name)}: {error.strerror}; restore it from a backup.") from None
        if hashlib.sha256(data).hexdigest() != name:
            raise LedgerError(f"{self._file(name)} is damaged: restore it from a backup.")
        return safetensors.torch.load(data)

    def _file(self, name: str) -> Path:
        return self.folder / "files" / f"{name}.safetensors"

    def _take_lock(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise LedgerError(
                f"the run in {self.folder} is being written by another process: "
                "stop that one, or choose another 'run.dir'."
            ) from None

    def _open(self, writable: bool) -> sqlite3.Connection:
        # Autocommit: every append is a transaction of its own; FULL makes it survive a power cut.
        uri = f"file:{self._path.absolute().as_posix()}?mode={'rwc' if writable else 'ro'}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10.0)
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if writable:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            if found == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
                found = FORMAT
        if found != FORMAT:
            raise LedgerError(
                f"{self._path} has format {found}, this FedTune writes {FORMAT}: use the matching release."
            )
        return db

    def _verify(self) -> bytes:
        last = b""
        rows = self._db.execute("SELECT seq, time, kind, round, node, body, blob, hash FROM records ORDER BY seq")
        for seq, at, kind, number, node, body, blob, digest in rows:
            last = _digest(last, at, kind, number, node, body, blob)
            if last != digest:
                raise LedgerError(f"{self._path} is damaged at record {seq}: restore it from a backup.")
        return last

    def _sqlite_error(self, error: sqlite3.DatabaseError) -> Exception:
        text = str(error)
        if "full" in text or "readonly" in text or "disk I/O" in text:
            return ResourceError(f"cannot write {self._path}: {text}; free space, then start the run again.")
        return LedgerError(f"{self._path}: {text}; restore it from a backup or choose another 'run.dir'.")


def _record(row: tuple[Any, ...]) -> Record:
    seq, at, kind, round, node, body, blob = row
    return Record(seq, at, kind, round, node, json.loads(body), blob)


def _digest(previous: bytes, at: float, kind: str, round: int, node: str, body: str, blob: bytes) -> bytes:
    head = json.dumps([at, kind, round, node, body]).encode()
    return hashlib.sha256(previous + hashlib.sha256(head).digest() + hashlib.sha256(blob).digest()).digest()
