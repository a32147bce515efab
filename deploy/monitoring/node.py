"""A node's own metrics: what its worker has done, for a Prometheus of its owner."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from starlette.responses import PlainTextResponse, Response

from deploy.common.address import split_listen
from deploy.common.web import serving, site
from deploy.monitoring.metrics import CONTENT_TYPE, worker_metrics
from deploy.status.operator import kept_token


@contextlib.contextmanager
def node_page(folder: Path, where: str) -> Iterator[str]:
    """Serve ``/metrics`` (under ``metrics.token``) and ``/healthz`` of a node until left; none without an address."""
    if not where:
        yield ""
        return
    host, port = split_listen(where)
    file = folder / "facts.json"
    token = kept_token(folder / "metrics.token")
    pages = site(
        public={"/healthz": lambda request: PlainTextResponse("ok\n")},
        guarded={"/metrics": lambda request: Response(worker_metrics(_facts(file)), media_type=CONTENT_TYPE)},
        token=token,
    )
    with serving(pages, host, port) as url:
        yield url


def _facts(file: Path) -> dict[str, Any] | None:
    """Read the facts of the worker that runs; None where none does."""
    with contextlib.suppress(OSError, ValueError):
        facts: dict[str, Any] = json.loads(file.read_text())
        if psutil.pid_exists(facts["pid"]):
            return facts
    return None
