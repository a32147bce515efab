"""How far the nodes are in their work: a note beside the ledger for whoever watches; nothing is computed from it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

FILE, MEASURED = "steps.json", "measured.json"
MOST_NODES = 200  # the farthest behind

Steps = dict[str, tuple[int, int]]  # by node: steps begun, and all of its task


def write_steps(folder: Path, steps: Steps) -> None:
    """Replace the note; a disk that is full costs the view alone."""
    slowest = sorted(steps.items(), key=lambda one: one[1][0] / one[1][1])[:MOST_NODES]
    _replace(folder / FILE, dict(slowest))


def write_measured(folder: Path, done: int, total: int) -> None:
    """Replace the note of how far an evaluation is."""
    _replace(folder / MEASURED, [done, total])


def read_measured(folder: Path, since: float) -> tuple[int, int] | None:
    """Read that note; None where it is older than the round whose model is measured."""
    with contextlib.suppress(OSError, ValueError):
        if (folder / MEASURED).stat().st_mtime >= since:
            done, total = json.loads((folder / MEASURED).read_text())
            return done, total
    return None


def _replace(file: Path, facts: object) -> None:
    partial = file.with_suffix(".partial")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(facts))
        partial.replace(file)


def read_steps(folder: Path, since: float) -> Steps:
    """Read the note, unless it is older than the round that is open: a server that was killed left it."""
    try:
        file = folder / FILE
        if file.stat().st_mtime < since:
            return {}
        return {name: (step, steps) for name, (step, steps) in json.loads(file.read_text()).items()}
    except (OSError, ValueError):
        return {}
