"""What differs between the releases of Flower that FedTune runs on, and how we take hold of its programs.

Flower 1.39 speaks gRPC with its nodes, on a port that is for them alone. Later releases speak HTTP, and have one port
for everything: nodes, runs and control. There we give nodes a second port of the same SuperLink, for them alone.
"""

from __future__ import annotations

import importlib
import re
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

from fedtune_strategies.errors import ConfigError, LinkError


def speaks_grpc(release: str) -> bool:
    """Whether SuperLink and SuperNode of a release speak gRPC with each other; if not, they speak HTTP."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2]) < (1, 40)


GRPC = speaks_grpc(version("flwr"))
SUPERNODE = ["--grpc-rere"] if GRPC else []  # what a SuperNode needs to find that port
FLEET = "/v1/fleet/"
IDLE = 75  # seconds for which an idle connection stays: a node that computes sends a heartbeat every 30

App = Callable[..., Awaitable[None]]


def replace(name: str, **ours: Any) -> ModuleType:
    """Put what is ours in the place of what a module of Flower uses; returns the module.

    Raises
    ------
    ConfigError
        This release of Flower uses something else: it would run without our secrets and checks.
    """
    module = importlib.import_module(name)
    if missing := sorted(one for one in ours if not hasattr(module, one)):
        raise ConfigError(
            f"FedTune cannot secure Flower {version('flwr')}: its {name} has no {missing[0]}; install the release "
            "that constraints.txt names"
        )
    for one, value in ours.items():
        setattr(module, one, value)
    return module


def check_reaches(server: str) -> None:
    """Raise `LinkError` where a server's release of Flower does not hear this machine's."""
    if speaks_grpc(server) != GRPC:
        words = {True: "gRPC", False: "HTTP"}
        raise LinkError(
            f"the server has flwr {server}, which speaks {words[not GRPC]} with its nodes, this machine "
            f"{version('flwr')}, which speaks {words[GRPC]}: install the server's release here"
        )


def keep_connections() -> None:
    """Have a SuperNode keep its connection from one request to the next; Flower's ends it after 5 s without any."""
    if not GRPC:
        import httpx

        # Less than `IDLE`, so that it never sends into a connection that ends.
        httpx.Client = partial(httpx.Client, limits=httpx.Limits(keepalive_expiry=IDLE - 15))  # type: ignore[misc,assignment]


def open_to_nodes(superlink: str, port: int) -> None:
    """Have the SuperLink's program listen on a port of 127.0.0.1 that is for nodes alone."""
    if GRPC:
        sys.argv += ["--fleet-api-type", "grpc-rere", "--fleet-api-address", f"127.0.0.1:{port}"]
    else:
        replace(superlink, uvicorn=SimpleNamespace(run=partial(_listen, port)))  # it is used for `run` alone


def _listen(fleet: int, app: App, *, host: str, port: int, **settings: Any) -> None:
    """Do what ``uvicorn.run`` does, on two ports; no line in the log for each of a node's looks for work."""
    import uvicorn

    own = {"interface": "asgi3", "access_log": False, "proxy_headers": False, "timeout_keep_alive": IDLE}
    sockets = [socket.create_server((host, each)) for each in (port, fleet)]
    uvicorn.Server(uvicorn.Config(partial(divided, app, fleet), **{**settings, **own})).run(sockets)


async def divided(app: App, fleet: int, scope: Any, receive: Any, send: Any) -> None:
    """Pass on all but what came to the nodes' port and is not for nodes."""
    for_nodes = scope["type"] == "http" and scope["path"].startswith(FLEET)
    if scope["type"] != "lifespan" and scope["server"][1] == fleet and not for_nodes:
        from starlette.responses import PlainTextResponse

        app = PlainTextResponse("nothing here", 404)
    await app(scope, receive, send)
