"""The page: one HTML file with its style, its script and, as a file, its data. It loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from deploy.common.paths import newest_runs
from deploy.status.report import report
from fedtune_strategies.errors import LedgerError
from server_app.run_view import RunView


def write_page(folder: Path, path: Path) -> None:
    """Write a page that shows a run, or all runs of a folder, as a single file.

    `folder`: a run's folder, or a folder of runs; finished or not.
    `path`: the HTML file; replaced where it exists.
    Raises `LedgerError`: there is no run in the folder.
    """
    views = [RunView(run) for run in newest_runs(folder)]
    for view in views:
        view.follow()
    if not views:
        raise LedgerError(f"no run in {folder}: name a run's folder ('run.dir'), or a folder that holds some.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(document(views)), encoding="utf-8")


def document(views: Iterable[RunView]) -> dict[str, Any]:
    """Put the reports of runs together as the page takes them."""
    return {"generated": time.time(), "runs": [report(view) for view in views]}


def render(data: dict[str, Any] | None) -> str:
    """Return the page's HTML.

    `data`: from `document`; None for a page that fetches ``report.json`` from its server.
    """
    # Inside a script element, only "<" could end the data.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _part("page.html")
    # The data comes last: what a node has named itself is never taken for a place to fill.
    for name, value in {"policy": policy(), "style": _style(), "script": _script(), "data": text}.items():
        page = page.replace(f"@{name}@", value, 1)
    return page


@cache
def policy() -> str:
    """Return the Content-Security-Policy: this style, this script, the own server, nothing else."""
    return (
        f"default-src 'none'; script-src '{_hash(_script())}'; style-src '{_hash(_style())}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def _style() -> str:
    return _part("page.css")


def _script() -> str:
    return _part("charts.js") + _part("page.js")


@cache
def _part(name: str) -> str:
    return (files("deploy.status") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
