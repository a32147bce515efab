"""Serve the status page and the metrics of runs while they run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from deploy.common.paths import newest_runs
from deploy.common.web import serving, site
from deploy.monitoring.metrics import CONTENT_TYPE, run_metrics
from deploy.status.page import document, policy, render
from server_app.run_view import RunView

FRESH_SECONDS = 1.0  # the ledgers are looked at once in so long, however many ask


@contextlib.contextmanager
def serve_page(
    folder: Path,
    token: str,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Iterator[str]:
    """Serve a run, or all runs of a folder, until left.

    ``/`` is the page, ``/report.json`` its data, ``/metrics`` the same for Prometheus, ``/healthz`` says
    that it is served. The page itself holds nothing of a run, so it needs no token; everything that does takes it as
    ``Authorization: Bearer``. It comes to the page behind the address's ``#``, which no log and no proxy sees.

    `folder`: a run's folder, or a folder in which runs will be.
    `token`: what a reader must show, also on loopback.
    `port`: port; 0 takes a free one.
    Yields: the address to open, token included.
    Raises `ConfigError`: certificate and key do not fit.
    Raises `PortError`: the address cannot be bound.
    """
    runs = Runs(folder)
    pages = site(
        public={"/": _page, "/healthz": lambda request: _healthy(runs.look())},
        guarded={
            "/report.json": lambda request: _report(runs.look(), request),
            "/metrics": lambda request: Response(run_metrics(runs.look().reports), media_type=CONTENT_TYPE),
        },
        token=token,
    )
    with serving(pages, host, port, certificate=certificate, key=key) as url:
        yield f"{url}#token={token}"


@dataclass
class Runs:
    """The runs of a folder, followed: each row of a ledger is read once."""

    folder: Path
    views: dict[Path, RunView] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    body: bytes = b""
    tag: str = ""
    looked: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self) -> Runs:
        """Take up what is new, at most once in `FRESH_SECONDS`."""
        with self.lock:
            if time.monotonic() - self.looked > FRESH_SECONDS or not self.looked:
                self._read()
                self.looked = time.monotonic()
        return self

    def _read(self) -> None:
        paths = newest_runs(self.folder)
        self.views = {path: self.views.get(path) or RunView(path) for path in paths}
        changed = [view.follow() for view in self.views.values()]
        if any(changed) or not self.body or len(paths) != len(self.reports):
            page = document(self.views.values())
            self.reports = page["runs"]
            self.tag = '"' + hashlib.sha256(json.dumps(self.reports).encode()).hexdigest()[:20] + '"'
            self.body = json.dumps(page, allow_nan=False, separators=(",", ":")).encode()


def _healthy(runs: Runs) -> Response:
    """Say that the page is served: a run that cannot be read is shown as such, and no reason to stop serving."""
    broken = sum(bool(view.unreadable) for view in runs.views.values())
    return PlainTextResponse(f"{len(runs.views) - broken} runs can be read, {broken} not\n")


def _page(request: Request) -> Response:
    return HTMLResponse(render(None), headers={"Content-Security-Policy": policy() + "; frame-ancestors 'none'"})


def _report(runs: Runs, request: Request) -> Response:
    known = request.headers.get("If-None-Match") == runs.tag
    body, status = (b"", 304) if known else (runs.body, 200)
    return Response(body, status, {"ETag": runs.tag}, "application/json")
