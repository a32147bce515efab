"""The server's one published port: nodes, their streams and joiners share it, and nothing else answers behind it.

The first bytes of a TLS connection name the protocols that the client speaks (ALPN) and the server that it wants (SNI).
Who asks for `JOIN` alone is passed on to the desk, where tokens are redeemed; who asks for a run's stream by its name,
to that run's ServerApp; everybody else to the SuperLink's fleet interface. TLS ends there, not here: nothing is
decrypted, and what is none of these is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

from deploy.common.join_token import JOIN
from deploy.common.relay import relay
from deploy.common.tls_hello import protocols, read_hello, server_name
from fedtune_strategies.stream.offer import socket_of

HELLO_SECONDS = 10.0
MOST_CONNECTIONS = 1000


class Front:
    """Listens on the published port.

    Parameters
    ----------
    fleet, desk : int
        Ports on 127.0.0.1 of the SuperLink's fleet interface and of the desk.
    streams : Path
        Folder in which every ServerApp has the socket of its stream.
    on_refused : callable
        Called with a line about a connection that was hung up on.
    """

    def __init__(
        self, fleet: int, desk: int, streams: Path, on_refused: Callable[[str], None] = lambda line: None
    ) -> None:
        self._fleet, self._desk, self._streams, self._on_refused = fleet, desk, streams, on_refused
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.traffic = [0, 0]  # bytes from and to all nodes and joiners

    async def open(self, host: str, port: int) -> None:
        """Begin to listen; raises OSError where that cannot be."""
        self._server = await asyncio.start_server(self._serve, host, port)

    async def close(self) -> None:
        """Hang up on everybody."""
        if self._server:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        if len(self._connections) >= MOST_CONNECTIONS:
            writer.close()
            return
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        # Either side may hang up at any moment; closing both is all there is to do.
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            try:
                hello = await asyncio.wait_for(read_hello(reader), HELLO_SECONDS)
                stream = socket_of(self._streams, server_name(hello))
                port = self._desk if protocols(hello) == [JOIN] else self._fleet
            except (ValueError, asyncio.IncompleteReadError, TimeoutError):
                host = writer.get_extra_info("peername")[0]
                self._on_refused(f"{host} speaks no TLS: hung up (a node needs the federation's ca.crt)")
                return
            behind = asyncio.open_unix_connection(stream) if stream else asyncio.open_connection("127.0.0.1", port)
            upstream_reader, upstream_writer = await behind
            with contextlib.closing(upstream_writer):
                upstream_writer.write(hello)
                await asyncio.gather(
                    relay(reader, upstream_writer, self.traffic, 0), relay(upstream_reader, writer, self.traffic, 1)
                )
