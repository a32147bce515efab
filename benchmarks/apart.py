"""A node in a fresh process, so that its memory and its seconds are its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


class Apart:
    """A node behind a pipe.

    `serve`: called in the fresh process with its end of a pipe and the arguments: answers every (kind, payload) until
        None comes, then sends what it measured.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments))
        self._process.start()
        theirs.close()  # or a node that died would be waited for

    def ask(self, kind: str, payload: bytes) -> Any:
        """Pass a task on; returns what ``serve`` answered."""
        self._pipe.send((kind, payload))
        return self._pipe.recv()

    def close(self) -> Any:
        """End the process; returns what ``serve`` sent last."""
        self._pipe.send(None)
        measured = self._pipe.recv()
        self._process.join()
        return measured


def tune_apart(serve: Callable[..., None], settings: dict[str, Any], *arguments: Any) -> Any:
    """Run with one node; returns what ``serve``, called with the pipe, settings and arguments, sent last."""
    # The node's process imports this module too, and must not grow by the server.
    from fedtune_strategies.testing import InMemoryGrid
    from server_app.run import execute

    node = Apart(serve, settings, *arguments)
    try:
        execute(InMemoryGrid({1: node.ask}), settings, run_id=1)
    finally:
        measured = node.close()
    return measured
