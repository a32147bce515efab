"""Whether a SuperLink is closed to strangers, in any release of Flower: asked before its server is published."""

from __future__ import annotations

import ssl
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from fedtune_strategies.errors import LinkError


def check_closed(control: int, fleet: int, authority: Path) -> None:
    """Ask the ports of a SuperLink on 127.0.0.1 as somebody who knows no secret.

    Raises
    ------
    LinkError
        Control or runtime interface would let a stranger in, or one of them answers on the nodes' port.
    """
    from flwr.proto.control_pb2 import ListRunsRequest
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    trust = ssl.create_default_context(cafile=authority)

    def status(kind: Any, name: str, port: int, ask: str, request: Any) -> int:
        shown = [RuntimeVersionHttpInterceptor(component_name=name)]
        with kind(f"https://127.0.0.1:{port}", interceptors=shown, verify=trust) as client:
            try:
                getattr(client, ask)(request)
            except httpx.HTTPStatusError as error:
                return error.response.status_code
            except httpx.TransportError:
                return 0  # it speaks something else
        return 200

    for port, refusals in ((control, (401,)), (fleet, (0, 404))):
        runs = status(ControlHttpClient, "flwr CLI", port, "ListRuns", ListRunsRequest())
        tasks = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        task = status(RuntimeHttpClient, "SuperExec", port, "AcquireTask", tasks)
        if runs not in refusals or task not in refusals:
            raise LinkError(
                f"Flower {version('flwr')} is open to strangers here (answers {runs} and {task} on port {port}), so "
                "nothing is published: install the release that constraints.txt names"
            )
