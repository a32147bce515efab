"""``python -m deploy.flower.supernode …``: Flower's SuperNode, which ends when it has given up its server.

Flower's own stays then, without a connection and without a word, and nobody starts it again.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from deploy.flower.versions import replace
from fedtune_strategies.folders import keep_private

PROGRAM = "flwr.supernode.cli.flower_supernode"


def ending(work: Any) -> Any:
    """Have the process end when the SuperNode's loop does; its web server would keep it there."""

    def run(**settings: Any) -> None:
        try:
            work(**settings)
        except Exception as error:
            print(f"the SuperNode ends: {error!r}", flush=True)
        os._exit(1)

    return run


if __name__ == "__main__":
    keep_private()
    work = importlib.import_module(PROGRAM).start_client_internal
    replace(PROGRAM, start_client_internal=ending(work)).flower_supernode()
