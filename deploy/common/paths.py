"""Where FedTune keeps what lives longer than a command: below ``$FEDTUNE_HOME``, by default ``~/.fedtune``."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fedtune_strategies.folders import MARK


def home() -> Path:
    """The folder of everything."""
    return Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune")).expanduser()


def server_folder() -> Path:
    """An operator's server: keys, members, Flower's state and logs."""
    return home() / "server"


def runs_folder() -> Path:
    """The runs that an operator submitted, each with its ledger and its model."""
    return home() / "runs"


def newest_runs(folder: Path, count: int = 12) -> list[Path]:
    """List at most so many runs in a folder, the newest first; a run's own folder is its only run."""
    if (folder / "ledger.sqlite").exists():
        return [folder]
    ledgers = sorted(folder.glob("*/ledger.sqlite"), key=_touched, reverse=True)
    return [ledger.parent for ledger in ledgers[:count]]


def _touched(ledger: Path) -> float:
    """Return when a ledger was written last: its log tells while it is open. An empty log is a mere reader's."""
    times = [0.0]
    for path in (ledger, ledger.with_name("ledger.sqlite-wal")):
        with contextlib.suppress(OSError):
            facts = path.stat()
            times += [facts.st_mtime] * (facts.st_size > 0)
    return max(times)


def nodes_folder() -> Path:
    """The federations that a device owner joined, each with its key."""
    return home() / "nodes"


def private_folder(folder: Path) -> Path:
    """Make a folder that its owner alone can enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / MARK).touch(0o600)
    return folder


def write_json(file: Path, content: Any) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    write_private(file, json.dumps(content, indent=2).encode())


def write_private(file: Path, content: bytes) -> None:
    """Write a file that is at no moment readable by others, and never half written."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
    # The new name must survive a power cut as the content does: an empty list of members would lock everybody out.
    handle = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
