"""``python -m deploy.flower.supernode …``: Flower's SuperNode, which ends when it has given up its server.

Flower's own stays then, without a connection and without a word, and nobody starts it again. It asks for messages every
three seconds, for 1 kB; while its node works over a stream, this one asks every thirty.
"""

from __future__ import annotations

import importlib
import os
import time
from types import SimpleNamespace
from typing import Any

from client_app.stats import has_stream
from deploy.flower.versions import keep_connections, replace
from fedtune_strategies.folders import keep_private

PROGRAM, LOOP = "flwr.supernode.cli.flower_supernode", "flwr.supernode.start_client_internal"
LONG = 30.0  # seconds; as often as it shows that it is alive


def ending(work: Any) -> Any:
    """Have the process end when the SuperNode's loop does; its web server would keep it there."""

    def run(**settings: Any) -> None:
        try:
            work(**settings)
        except Exception as error:
            print(f"the SuperNode ends: {error!r}", flush=True)
        os._exit(1)

    return run


def rest(seconds: float) -> None:
    """Wait as long as Flower does; until the next look for messages, longer while there is a stream."""
    start = time.monotonic()
    time.sleep(seconds)
    while seconds >= 1.0 and time.monotonic() - start < LONG and has_stream():
        time.sleep(seconds)


if __name__ == "__main__":
    keep_private()
    keep_connections()
    replace(LOOP, time=SimpleNamespace(sleep=rest))
    work = importlib.import_module(PROGRAM).start_client_internal
    replace(PROGRAM, start_client_internal=ending(work)).flower_supernode()
