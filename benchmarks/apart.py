"""A run whose one node is a fresh process, so that its memory and its seconds are its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def tune_apart(serve: Callable[..., None], settings: dict[str, Any], *arguments: Any) -> Any:
    """Run with one node.

    Parameters
    ----------
    serve : callable
        Called in the fresh process with its end of a pipe, the settings and the arguments: answers every
        (kind, payload) until None comes, then sends what it measured.
    settings : dict
        The run configuration.
    *arguments
        For ``serve``.

    Returns
    -------
    Any
        What ``serve`` sent last.
    """
    # The node's process imports this module too, and must not grow by the server.
    from fedtune_strategies.testing import InMemoryGrid
    from server_app.run import execute

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, settings, *arguments))
    process.start()
    there.close()  # or a node that died would be waited for

    def ask(kind: str, payload: bytes) -> tuple[str, bytes]:
        here.send((kind, payload))
        return here.recv()

    try:
        execute(InMemoryGrid({1: ask}), settings, run_id=1)
    finally:
        here.send(None)
        measured = here.recv()
        process.join()
    return measured
