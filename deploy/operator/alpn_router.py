"""The server's one published port: nodes, their streams and joiners share it, and nothing else answers behind it.

The first bytes of a TLS connection name the protocols that the client speaks (ALPN) and the server that it wants (SNI).
Who asks for `JOIN` alone is passed on to the desk, where tokens are redeemed; who asks for a run's stream by its name,
to that run's ServerApp; everybody else to the SuperLink's fleet interface. TLS ends there, not here: nothing is
decrypted, and what is none of these is hung up on.

Until its client has answered the server's side of the handshake, a connection makes way for newer ones, and lasts
seconds. No address has more than a quarter of all places, and silence ends a place. Who answers may still be nobody's
member, as TLS ends behind this port; so where all places are taken, the address that has most gives one to an address
that has fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deploy.common.join_token import JOIN
from deploy.common.relay import relay
from deploy.common.tls_hello import protocols, read_hello, server_name
from fedtune_strategies.stream.offer import socket_of

HELLO_SECONDS = 10.0  # for a hello, and then for the client's next bytes
RESTART_SECONDS = 20.0  # for a SuperLink that ended to be back; it needs five
IDLE_SECONDS = 150.0  # nodes and their streams send something every 30 s, also while they compute
CONNECTIONS = 4096
SAY_EVERY = 60.0  # seconds between two lines of one kind
_OTHER_FILES = 256  # that this process has open beside connections, at most


@dataclass
class _Place:
    host: str
    counts: list[int] = field(default_factory=lambda: [0, 0])  # bytes that came after the hello, and that went back

    @property
    def proven(self) -> bool:
        """Whether the client has answered the server."""
        return self.counts[0] > 0


def room_for(connections: int) -> int:
    """Raise this process's limit of open files, two for a connection; returns how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + _OTHER_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(connections, (max(soft, limit) - _OTHER_FILES) // 2)


async def _behind(stream: Path | None, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to what is behind; a SuperLink that is being started again is waited for."""
    if stream:
        return await asyncio.open_unix_connection(stream)
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.25)


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
    connections : int
        Most places; see `room_for`.
    """

    def __init__(
        self,
        fleet: int,
        desk: int,
        streams: Path,
        on_refused: Callable[[str], None] = lambda line: None,
        connections: int = CONNECTIONS,
    ) -> None:
        self._fleet, self._desk, self._streams, self._on_refused = fleet, desk, streams, on_refused
        self._most, self._share = connections, max(connections // 4, 1)
        self._places: dict[asyncio.Task[None], _Place] = {}  # the oldest first
        self._held: Counter[str] = Counter()  # places by address
        self._said: dict[str, float] = {}
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Begin to listen; raises OSError where that cannot be."""
        self._server = await asyncio.start_server(self._serve, host, port, backlog=1024)

    async def close(self) -> None:
        """Hang up on everybody."""
        if self._server:
            self._server.close()
        connections = list(self._places)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, host = asyncio.current_task(), (writer.get_extra_info("peername") or ["?"])[0]
        assert connection is not None
        if not self._has_room(host):
            writer.close()
            return
        place = self._places[connection] = _Place(host)
        self._held[host] += 1
        connection.add_done_callback(self._give_up)
        # Either side may hang up at any moment, and so do we when nothing comes; closing both is all there is to do.
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            try:
                # Not wait_for, which before Python 3.12 can swallow that this connection was to make way.
                async with asyncio.timeout(HELLO_SECONDS):
                    hello = await read_hello(reader)
                stream = socket_of(self._streams, server_name(hello))
                port = self._desk if protocols(hello) == [JOIN] else self._fleet
            except (ValueError, asyncio.IncompleteReadError, TimeoutError):
                self._say("plain", f"{host} speaks no TLS: hung up (a node needs the federation's ca.crt)")
                return
            try:
                async with asyncio.timeout(RESTART_SECONDS):
                    upstream_reader, upstream_writer = await _behind(stream, port)
            except (OSError, TimeoutError):
                # A reset, which a SuperNode takes as a reason to try again; it would give up for ever at an end in the
                # middle of TLS's handshake.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            with contextlib.closing(upstream_writer):
                upstream_writer.write(hello)
                await asyncio.gather(
                    relay(reader, upstream_writer, place.counts, 0, first=HELLO_SECONDS, idle=IDLE_SECONDS),
                    relay(upstream_reader, writer, place.counts, 1),
                )

    def _has_room(self, host: str) -> bool:
        """Say whether another connection may come, and make room for it where that is fair."""
        if (crowded := self._held[host] >= self._share) or len(self._places) >= self._most:
            silent = (
                task for task, one in self._places.items() if not one.proven and (not crowded or one.host == host)
            )
            if (given := next(silent, None) or (None if crowded else self._spare(host))) is None:
                who = f"{host} has a quarter of them" if crowded else "all are taken"
                self._say("full", f"hung up on {host}: of {self._most} connections {who} (see --connections)")
                return False
            given.cancel()
            self._give_up(given)
        return True

    def _spare(self, host: str) -> asyncio.Task[None] | None:
        """The newest place of the address that has most, unless the one that asks has as many with one more."""
        richest, held = max(self._held.items(), key=lambda one: one[1])
        if held <= self._held[host] + 1:
            return None
        return next(task for task, one in reversed(self._places.items()) if one.host == richest)

    def _give_up(self, connection: asyncio.Task[None]) -> None:
        if place := self._places.pop(connection, None):
            self._held[place.host] -= 1
            if not self._held[place.host]:
                del self._held[place.host]

    def _say(self, kind: str, line: str) -> None:
        """Say something at most once a minute: strangers fill no log."""
        now = time.monotonic()
        if now - self._said.get(kind, -SAY_EVERY) >= SAY_EVERY:
            self._said[kind] = now
            self._on_refused(line)
