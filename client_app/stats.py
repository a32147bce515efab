"""What a worker has done, in a file for whoever watches this machine: ``fedtune join --metrics`` does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fedtune_strategies.memory import peak_memory

# Names the file; where it is not set, nothing is written.
VARIABLE = "FEDTUNE_FACTS"


class Stats:
    """Counts a worker's tasks since it was started; `note` writes them."""

    def __init__(self) -> None:
        self.path = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
        self.counts: dict[str, Any] = {
            "tasks": 0, "failures": 0, "seconds": 0.0, "bytes_down": 0, "bytes_up": 0, "started": time.time(),
        }  # fmt: skip

    def note(self, kind: str, reply: str, down: int, up: int, seconds: float) -> None:
        """Count one task.

        Parameters
        ----------
        kind, reply : str
            Kinds of the task and of its answer.
        down, up : int
            Their payloads in bytes.
        seconds : float
            How long it took.
        """
        counts = self.counts
        counts["tasks"] += 1
        counts["failures"] += reply == "failure"
        counts["seconds"] += seconds
        counts["bytes_down"] += down
        counts["bytes_up"] += up
        if self.path is None:
            return
        newest = {"last_kind": kind, "last_seconds": seconds, "last_time": time.time(), "peak_memory": peak_memory()}
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(counts | newest | {"pid": os.getpid()}))
            partial.replace(self.path)
        except OSError:
            # Whoever watches sees no news; the task is done all the same.
            self.path = None
