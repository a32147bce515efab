"""The event loop of this process's streams: gRPC's async calls want one for all, which is never closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def stream_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, which runs in its own thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="streams", daemon=True).start()
    return loop


def call(work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
    """Run a coroutine in the loop and wait for it, at most so long."""
    return asyncio.run_coroutine_threadsafe(work, stream_loop()).result(seconds)
