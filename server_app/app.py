"""The ServerApp: Flower's run config in, a tuned model out."""

from __future__ import annotations

import logging
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run `server_app.run.execute`; a user's mistake fails the run with one line in Flower's log and run list.

    With ``FEDTUNE_LOG=json`` our lines go to standard output, of which Flower makes `flwr log` too.
    """
    from fedtune_strategies.folders import keep_private
    from fedtune_strategies.logs import json_handler
    from fedtune_strategies.memory import prefer_memory
    from server_app.run import execute

    keep_private()
    prefer_memory()  # what a commit frees would stay as much again as the model
    logging.getLogger("fedtune").addHandler(json_handler(sys.stdout) or _flower_handler())
    logging.getLogger("fedtune").setLevel(logging.INFO)
    # Libraries that set up the root logger would write every line a second time.
    logging.getLogger("fedtune").propagate = False
    logging.getLogger("flwr").addFilter(_without_trace)
    execute(grid, context.run_config, context.run_id)


def _flower_handler() -> logging.Handler:
    # Flower sends what its own logger gets to `flwr log`.
    handler = logging.Handler()
    handler.emit = logging.getLogger("flwr").handle  # type: ignore[method-assign]
    return handler


def _without_trace(record: logging.LogRecord) -> bool:
    from fedtune_strategies.errors import FedTuneError

    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, FedTuneError):
        record.msg, record.args, record.exc_info = str(error), None, None
    return True
