"""A byte counter on each node's connection: a TCP proxy on loopback, one port per node.

A node connects to its port here, and the proxy to the SuperLink. TLS passes through untouched, so what is counted is
what TCP carries for that node: handshakes, framework overhead and payload. Nothing is kept but the counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.common.relay import relay

TIMEOUT = 10.0  # seconds for opening or closing all ports


@dataclass(frozen=True)
class Traffic:
    """Bytes that a node sent (``up``) and received (``down``)."""

    up: int = 0
    down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.up - other.up, self.down - other.down)


class ByteProxy:
    """Count the bytes of every node's connection; a context manager that runs in its own thread.

    `host`, `port`: where the SuperLink's fleet API listens, or will: a node that comes earlier is hung up on and tries
        again.
    `nodes`: names of the nodes; each gets a free port on 127.0.0.1.
    """

    def __init__(self, host: str, port: int, nodes: Sequence[str]) -> None:
        self._target = (host, port)
        self._nodes = list(nodes)
        self._counts = {node: [0, 0] for node in nodes}  # up, down
        self._servers: dict[str, asyncio.Server] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="byte-proxy", daemon=True)

    def __enter__(self) -> ByteProxy:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def address(self, node: str) -> str:
        """Where this node finds the SuperLink, as ``host:port``."""
        host, port = self._servers[node].sockets[0].getsockname()
        return f"{host}:{port}"

    def snapshot(self) -> dict[str, Traffic]:
        """Bytes of every node since the proxy was opened."""
        return {node: Traffic(up, down) for node, (up, down) in self._counts.items()}

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT)

    async def _open(self) -> None:
        for node in self._nodes:
            serve = functools.partial(self._serve, node)
            self._servers[node] = await asyncio.start_server(serve, "127.0.0.1", 0)

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        # Either side may hang up at any moment; that is theirs to handle, and closing both is all there is to do here.
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
            with contextlib.closing(upstream_writer):
                await asyncio.gather(
                    relay(reader, upstream_writer, self._counts[node], 0),
                    relay(upstream_reader, writer, self._counts[node], 1),
                )
        self._connections.discard(connection)
