"""``python -m deploy.flower.task KIND ADDRESS CA PARENT``: one task of Flower's, done by the FedTune that is installed.

The bundle that came with the run is looked into first, and refused where it is another than FedTune's. Code is loaded
from this installation in any case, never from where Flower unpacks bundles. Started by `deploy.flower.executor`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from queue import Queue
from typing import Any

from flwr.cli.install import install_from_fab
from flwr.supercore.constant import TaskType

from deploy.flower.bundle import check_bundle
from deploy.flower.versions import replace
from fedtune_strategies.folders import keep_private


def run_client(**connection: Any) -> None:
    """Do a ClientApp's task."""

    def installed(*_: str) -> Any:
        from client_app.app import app

        return app

    program = replace(
        "flwr.supernode.runtime.run_clientapp",
        install_from_fab=lambda content, **_: check_bundle(content),
        get_load_client_app_fn=lambda **_: installed,
    )
    program.run_clientapp(**connection)


def run_server(**connection: Any) -> None:
    """Do a ServerApp's task; what it prints goes to ``flwr log``."""
    from flwr.server.run_serverapp import run
    from flwr.supercore.logger import mirror_output_to_queue, restore_output

    def install(content: bytes, **_: Any) -> Path:
        check_bundle(content)
        return install_from_fab(content, skip_prompt=True)  # its configuration is read from there

    def installed(grid: Any, context: Any, server_app_dir: str, server_app_attr: str) -> Any:
        from server_app.app import app

        return run(grid, context, server_app_dir, loaded_server_app=app)

    program = replace("flwr.superlink.runtime.run_serverapp", install_from_fab=install, run_=installed)
    output: Queue[str | None] = Queue()
    mirror_output_to_queue(output)
    program.run_serverapp(log_queue=output, **connection)
    restore_output()


if __name__ == "__main__":
    keep_private()
    kind, address, authority, parent = sys.argv[1:]
    do = {TaskType.CLIENT_APP: run_client, TaskType.SERVER_APP: run_server}[TaskType(kind)]
    do(
        runtime_api_address=address,
        token=sys.stdin.read(),
        insecure=False,
        certificates=Path(authority).read_bytes(),
        parent_pid=int(parent),
    )
