"""What a worker does and has done, in a file for whoever watches this machine: ``fedtune join`` does."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedtune_strategies.memory import private_peak

# Names the file; where it is not set, nothing is written.
VARIABLE = "FEDTUNE_FACTS"
STEP_EVERY = 2.0  # seconds between two notes of a task's steps; what takes less is not worth one


def _stream_lock() -> FileLock | None:
    facts = os.environ.get(VARIABLE)
    return FileLock(Path(facts).with_name("stream.lock"), timeout=1.0) if facts else None


@contextlib.contextmanager
def stream_is_open() -> Iterator[None]:
    """Let whoever watches this machine see that there is a stream, until the block is left or the worker dies."""
    lock = _stream_lock()
    with contextlib.suppress(OSError):  # nobody sees it then, and all works as without
        if lock:
            lock.acquire()
    try:
        yield
    finally:
        if lock:
            lock.release()


def has_stream() -> bool:
    """Say whether a worker of this process's node has a stream."""
    lock = _stream_lock()
    try:
        if lock:
            with lock.acquire(timeout=0):
                return False
    except Timeout:
        return True
    return False


class Stats:
    """Counts a worker's tasks since it was started; `note` and `step` write them."""

    def __init__(self) -> None:
        self.path = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
        self.counts: dict[str, Any] = {
            "tasks": 0, "failures": 0, "seconds": 0.0, "bytes_down": 0, "bytes_up": 0, "started": time.time(),
        }  # fmt: skip
        self.now = 0, 0  # steps of the task that have begun, and all of them
        self._stepped = 0.0

    def step(self, begun: int, steps: int) -> None:
        """Say how far the task is."""
        self.now = begun, steps
        now = time.monotonic()
        if begun == 1:
            self._stepped = now
        elif now - self._stepped > STEP_EVERY:
            self._stepped = now
            self._write({"step": begun, "steps": steps})

    def note(self, kind: str, reply: str, down: int, up: int, seconds: float) -> None:
        """Count one task, by the kinds of the task and of its answer."""
        counts = self.counts
        counts["tasks"] += 1
        counts["failures"] += reply == "failure"
        counts["seconds"] += seconds
        counts["bytes_down"] += down
        counts["bytes_up"] += up
        counts |= {"last_kind": kind, "last_seconds": seconds, "last_time": time.time(), "peak_memory": private_peak()}
        self.now = 0, 0
        self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(self.counts | more | {"pid": os.getpid()}))
            partial.replace(self.path)
        except OSError:
            # Whoever watches sees no news; the task is done all the same.
            self.path = None
