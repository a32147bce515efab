"""The ledger: the append-only record of a run, its checkpoint, its audit log and the source of every report.

One SQLite file in WAL mode holds one row per event; the rows form a hash chain, so a damaged row is found. Large
parts (a block's weights, a long reply) are immutable files named by their hash, written before the row that names
them. The state of a run is a fold over the rows: when anything is killed at any moment, the next start continues from
the last committed row. `server_app.ledger_file` finds damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fedtune_strategies.errors import FedTuneError, LedgerError, ResourceError
from server_app import ledger_file
from server_app.ledger_file import INLINE_BYTES, Damage

if TYPE_CHECKING:  # who reads what happened needs no torch
    from torch import Tensor

log = logging.getLogger("fedtune")

_SENT = ("reply", "acknowledged")  # records whose payload a node sent
_COLUMNS = "seq, time, kind, round, node, body, file"


@dataclass(frozen=True)
class Record:
    """One row."""

    seq: int  # position in the ledger, from 1
    time: float  # seconds since the epoch, UTC
    # ``submitted``, ``start``, ``cut``, ``joined``, ``refused``, ``lost``, ``late``, ``asked``, ``reply``,
    # ``acknowledged``, ``round``, ``evaluation``, ``pruned``, ``failed``, ``stopped`` or ``finished``
    kind: str
    round: int  # round, 0 outside one
    node: str  # name of the node, empty where none is concerned
    body: dict[str, Any]  # the event's facts, as JSON
    # name of the file that holds a long payload, otherwise empty. `Ledger.payload` reads it from there or the row
    file: str = ""


class Ledger:
    """Open a run's ledger: one writer, any number of readers.

    A damaged tail is cut back to the last good record with a warning and a record of kind ``cut``; the damaged file is
    kept beside it. With `cut_anywhere`, that is so even if good records follow the damage; else it is an error.
    """

    def __init__(self, folder: Path, *, writable: bool = True, cut_anywhere: bool = False) -> None:
        self.folder = folder
        self._path = folder / "ledger.sqlite"
        self._head = folder / "ledger.head"
        # The moment's patience is for those who only ask whether it is taken.
        self._lock = FileLock(folder / "ledger.lock", timeout=0.5)
        if not writable and not self._path.exists():
            raise LedgerError(f"no ledger in {folder}: check 'run.dir'.")
        try:
            if writable:
                folder.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                found = self._cut_back(cut_anywhere)
            self._db = self._open(writable)
            self._hash = self._last_hash() if writable else b""
        except (*ledger_file.UNREADABLE, OSError, FedTuneError) as error:
            self._lock.release()
            raise self._plain(error) from None
        if writable and found is not None:
            self.append("cut", body={"after": found.good, "reason": str(found)})

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Open for reading alone, while another process may write."""
        return cls(folder, writable=False)

    @staticmethod
    def is_written(folder: Path) -> bool:
        """Say whether a process has this ledger open for writing: whether its run is running."""
        try:
            with FileLock(folder / "ledger.lock", timeout=0):
                return False
        except Timeout:
            return True

    def close(self) -> None:
        """Close the file and give the writer's lock back."""
        self._db.close()
        self._lock.release()

    def append(
        self, kind: str, *, round: int = 0, node: str = "", body: dict[str, Any] | None = None, blob: bytes = b""
    ) -> Record:
        """Append one record; it is on disk when this returns, or the ledger is as before."""
        text = json.dumps(body or {}, sort_keys=True, separators=(",", ":"))
        now = time.time()
        file = self._put(lambda path: path.write_bytes(blob)) if len(blob) > INLINE_BYTES else ""
        digest = ledger_file.digest(self._hash, now, kind, round, node, text, blob, "")
        if file:
            blob = b""
        try:
            cursor = self._db.execute(
                "INSERT INTO records (time, kind, round, node, body, blob, file, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (now, kind, round, node, text, blob, file, digest),
            )
        except sqlite3.DatabaseError as error:
            raise self._plain(error) from None
        self._hash = digest
        seq = int(cursor.lastrowid or 0)
        if not self._db.in_transaction:
            ledger_file.note_head(self._head, seq)
        return Record(seq, now, kind, round, node, json.loads(text), file)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Append the records within in one transaction: all are on disk when it is left, or none where it fails."""
        before = self._hash
        try:
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            self._hash = before
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                raise self._plain(error) from None
            raise
        if self._hash != before:
            ledger_file.note_head(self._head, self.end())

    def records(self, *kinds: str, round: int | None = None, after: int = 0) -> Iterator[Record]:
        """Yield records in order: of these kinds, of this round, behind this position."""
        # Who follows a ledger reads what is new alone, not the index of all that there ever was of a kind.
        query = f"SELECT {_COLUMNS} FROM records {'NOT INDEXED' if after else ''} WHERE seq > ?"
        values: list[Any] = [after, *kinds]
        if kinds:
            query += f" AND kind IN ({', '.join('?' * len(kinds))})"
        if round is not None:
            query += " AND round = ?"
            values.append(round)
        yield from self._select(query + " ORDER BY seq", values)

    def end(self) -> int:
        """Return the position of the newest record, 0 where there is none: who follows reads on from there."""
        return int(self._db.execute("SELECT max(seq) FROM records").fetchone()[0] or 0)

    def last(self, kind: str) -> Record | None:
        """Return the newest record of a kind, None where there is none."""
        query = f"SELECT {_COLUMNS} FROM records WHERE seq = (SELECT max(seq) FROM records WHERE kind = ?)"
        return next(self._select(query, [kind]), None)

    def payload(self, record: Record) -> bytes:
        """Return a record's payload, wherever it is."""
        if record.file:
            return self._get(record.file)
        try:
            row = self._db.execute("SELECT blob FROM records WHERE seq = ?", [record.seq]).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._plain(error) from None
        if row is None or not isinstance(row[0], bytes):
            raise LedgerError(f"{self._path} is damaged: see `fedtune ledger verify {self.folder}`.")
        return row[0]

    def put_file(self, tensors: dict[str, Tensor]) -> str:
        """Store tensors as an immutable safetensors file; returns the SHA-256 of its bytes, which is its name."""
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return self._put(lambda path: save_file(whole, path))

    def get_file(self, name: str) -> dict[str, Tensor]:
        """Map a stored file whose bytes are those that were stored: its pages are read when touched."""
        from fedtune_strategies.language.model_files import map_tensors

        self.check_file(name)
        return map_tensors([self._file(name)])

    def check_file(self, name: str) -> None:
        """Raise `LedgerError` if a stored file is missing or damaged; holds little of it in memory."""
        try:
            found = _sha256(self._file(name))
        except OSError as error:
            raise LedgerError(f"{self._file(name)}: {error.strerror}; restore it from a backup.") from None
        if found != name:
            raise LedgerError(f"{self._file(name)} is damaged: restore it from a backup.")

    def forget_replies(self) -> None:
        """Forget what nodes sent in the rounds that were committed since this was called last.

        The records stay, and with them the chain of hashes, in which a payload counts by its own hash. What was sent
        cannot be folded again; models after any round, reports and a resumption need none of it. The room is used for
        what comes.
        """
        # What came before that commit was forgotten then: a round costs as much in a long run as in a short one.
        before = self.last("pruned")
        self._forget_replies(int(before.body["after"]) if before else 0)

    def _forget_replies(self, after: int) -> None:
        committed = self.last("round")
        if committed is None:
            return
        with self.together():
            names = ledger_file.forget_payloads(self._db, _SENT, committed.round, after)
            self.append("pruned", round=committed.round, body={"after": committed.seq})
        kept = {name for _, name in self.files(after)}
        for name in names - kept:
            self._file(name).unlink(missing_ok=True)

    def prune(self) -> int:
        """Remove what nodes sent in the rounds that are committed, and return how many bytes that were."""
        before = self._bytes_on_disk()
        self._forget_replies(0)
        try:
            self._db.execute("VACUUM")
            return before - self._bytes_on_disk()
        except sqlite3.DatabaseError as error:
            raise self._plain(error) from None

    def _bytes_on_disk(self) -> int:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return sum(path.stat().st_size for path in [self._path, *self.folder.glob("files/*")])

    def files(self, after: int = 0) -> Iterator[tuple[Record, str]]:
        """Yield every file that a record behind this position names and that was not pruned, with the record."""
        pruned = self.last("pruned")
        for record in self.records(after=after):
            if pruned and record.kind in _SENT and record.round <= pruned.round:
                continue
            named = record.body.get("files")
            for name in (record.file, *(named.values() if isinstance(named, dict) else ())):
                if name:
                    yield record, str(name)

    def damage(self) -> Damage | None:
        """Look for the first record that is not as it was written; None where all are."""
        try:
            return ledger_file.find_corruption(self._path, ledger_file.read_head(self._head))
        except ledger_file.UNREADABLE as error:
            raise self._plain(error) from None

    def _put(self, write: Callable[[Path], object]) -> str:
        partial = self.folder / "files" / "new.partial"  # there is one writer
        try:
            partial.parent.mkdir(exist_ok=True)
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            name = _sha256(partial)
            partial.replace(self._file(name))
            ledger_file.sync_folder(partial.parent)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ResourceError(
                f"cannot write {partial.parent}: {getattr(error, 'strerror', error)}; "
                "free space, then start the run again."
            ) from None
        return name

    def _get(self, name: str) -> bytes:
        self.check_file(name)
        return self._file(name).read_bytes()

    def _file(self, name: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", name):
            raise LedgerError(f"{self._path} is damaged: see `fedtune ledger verify {self.folder}`.")
        return self.folder / "files" / f"{name}.safetensors"

    def _take_lock(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise LedgerError(
                f"the run in {self.folder} is being written by another process: "
                "stop that one, or choose another 'run.dir'."
            ) from None

    def _cut_back(self, anywhere: bool) -> Damage | None:
        """Before anything is written: where the ledger is damaged, go back to the last good record."""
        found = (
            ledger_file.find_corruption(self._path, ledger_file.read_head(self._head)) if self._path.exists() else None
        )
        if found is None:
            return None
        if not found.good or (found.good_after and not anywhere):
            remedy = (
                f", or go back to record {found.good} with `fedtune ledger cut {self.folder}`" if found.good else ""
            )
            raise LedgerError(f"{self._path}: {found}; restore it from a backup{remedy}.")
        kept = ledger_file.truncate_to(self._path, found.good)
        log.warning(
            "%s: %s; going on from record %d, the file is kept as it was, as %s", self._path, found, found.good, kept
        )
        return found

    def _open(self, writable: bool) -> sqlite3.Connection:
        # Autocommit: every append is its own transaction; FULL makes it survive a power cut.
        if writable and not self._path.exists():
            ledger_file.make(self._path)
        uri = f"{self._path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10.0)
        if writable:
            db.execute("PRAGMA synchronous = FULL")
        ledger_file.check_format(db, self._path)
        return db

    def _last_hash(self) -> bytes:
        row = self._db.execute("SELECT hash FROM records ORDER BY seq DESC LIMIT 1").fetchone()
        if row and not isinstance(row[0], bytes):
            raise LedgerError(f"{self._path} is damaged: restore it from a backup.")
        return row[0] if row else b""

    def _select(self, query: str, values: list[Any]) -> Iterator[Record]:
        try:
            for seq, at, kind, round, node, body, file in self._db.execute(query, values):
                facts = json.loads(body)
                if not isinstance(facts, dict):
                    raise ValueError("no facts")
                yield Record(seq, at, kind, round, node, facts, file)
        except sqlite3.DatabaseError as error:
            raise self._plain(error) from None
        except (ValueError, TypeError, RecursionError):
            raise LedgerError(f"{self._path} is damaged: see `fedtune ledger verify {self.folder}`.") from None

    def _plain(self, error: Exception) -> FedTuneError:
        if isinstance(error, FedTuneError):
            return error
        if isinstance(error, OSError):
            return ResourceError(f"{self.folder}: {error.strerror or error}; choose another 'run.dir' or free space.")
        text = "damaged" if isinstance(error, UnicodeDecodeError) else str(error)
        if "full" in text or "readonly" in text or "disk I/O" in text:
            return ResourceError(f"cannot write {self._path}: {text}; free space, then start the run again.")
        return LedgerError(f"{self._path}: {text}; restore it from a backup or choose another 'run.dir'.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
