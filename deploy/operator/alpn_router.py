"""The server's one published port: nodes and joiners share it, and nothing else answers behind it.

The first bytes of a TLS connection name the protocols that the client speaks (ALPN). Who asks for `JOIN` alone is
passed on to the desk, where tokens are redeemed; everybody else to the SuperLink's fleet interface. TLS ends there,
not here: nothing is decrypted, and what is neither is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

from deploy.common.join_token import JOIN
from deploy.common.relay import relay

HELLO_SECONDS = 10.0
MOST_CONNECTIONS = 1000
_HANDSHAKE, _CLIENT_HELLO, _ALPN = 22, 1, 16


class Front:
    """Listens on the published port.

    Parameters
    ----------
    fleet, desk : int
        Ports on 127.0.0.1 of the SuperLink's fleet interface and of the desk.
    on_refused : callable
        Called with a line about a connection that was hung up on.
    """

    def __init__(self, fleet: int, desk: int, on_refused: Callable[[str], None] = lambda line: None) -> None:
        self._fleet, self._desk, self._on_refused = fleet, desk, on_refused
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
                port = self._desk if protocols(hello) == [JOIN] else self._fleet
            except (ValueError, asyncio.IncompleteReadError, TimeoutError):
                host = writer.get_extra_info("peername")[0]
                self._on_refused(f"{host} speaks no TLS: hung up (a node needs the federation's ca.crt)")
                return
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(upstream_writer):
                upstream_writer.write(hello)
                await asyncio.gather(
                    relay(reader, upstream_writer, self.traffic, 0), relay(upstream_reader, writer, self.traffic, 1)
                )


async def read_hello(reader: asyncio.StreamReader) -> bytes:
    """Read the first TLS record, which holds the client's hello.

    Raises
    ------
    ValueError
        It is something else.
    """
    head = await reader.readexactly(5)
    kind, _, length = struct.unpack(">BHH", head)
    if kind != _HANDSHAKE or not 0 < length <= 1 << 14:
        raise ValueError("no TLS handshake")
    return head + await reader.readexactly(length)


def protocols(hello: bytes) -> list[str]:
    """Return the application protocols that a client's hello offers (RFC 8446 section 4.1.2, RFC 7301 section 3.1).

    Parameters
    ----------
    hello : bytes
        A TLS record.

    Returns
    -------
    list of str
        In the client's order; empty where it names none.

    Raises
    ------
    ValueError
        It is not a client's hello, or not whole.
    """
    try:
        if hello[5] != _CLIENT_HELLO:
            raise ValueError("no client hello")
        at = 5 + 4 + 2 + 32  # record, handshake, version, random
        at += 1 + hello[at]  # session id
        at += 2 + int.from_bytes(hello[at : at + 2], "big")  # cipher suites
        at += 1 + hello[at]  # compression
        end = at + 2 + int.from_bytes(hello[at : at + 2], "big")
        at += 2
        while at + 4 <= min(end, len(hello)):
            kind, length = struct.unpack_from(">HH", hello, at)
            if kind == _ALPN:
                return list(_names(hello[at + 6 : at + 4 + length]))
            at += 4 + length
    except (IndexError, struct.error):
        raise ValueError("a client hello that is not whole") from None
    return []


def _names(names: bytes) -> list[str]:
    found, at = [], 0
    while at < len(names):
        found.append(names[at + 1 : at + 1 + names[at]].decode("latin-1"))
        at += 1 + names[at]
    return found
