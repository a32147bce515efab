"""The ServerApp's side of the streams: one gRPC server in a thread, one session for each node.

A session begins with an offer that Flower carried to the node, and is known by nothing but the secret in it. It lives
over broken connections; one that stays broken or silent is lost, and what it still had to do is reported.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedtune_strategies.errors import PortError, ProtocolError
from fedtune_strategies.stream.certificate import make_certificate
from fedtune_strategies.stream.frames import LONGEST_FRAME, METHOD, SECRET, SERVICE, Part, Welcome, encode
from fedtune_strategies.stream.link import Incoming, Link, Outgoing, prepare
from fedtune_strategies.stream.loop import call
from fedtune_strategies.stream.offer import Offer, new_name, socket_of

log = logging.getLogger("fedtune")

SILENT_S, IDLE_SILENT_S = 9.0, 75.0  # without a sign of life a node with a task, or without one, is lost
RECONNECT_S = 4.0  # for which a broken connection is waited for
HIDDEN_S = 60.0  # after which Flower has noticed a lost node too, or knows that it is there
MOST_BYTES = 2**31  # of a reply, unless the model is larger
_LOOK_S = 1.0
OPTIONS = [
    ("grpc.max_receive_message_length", LONGEST_FRAME),
    ("grpc.max_metadata_size", 4096),
    ("grpc.max_concurrent_streams", 1),
    ("grpc.max_connection_idle_ms", 30_000),  # of one that opens no stream
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.bdp_probe", 0),  # costs more bytes than a warm round's payload
    ("grpc.http2.lookahead_bytes", 2**20),
    ("grpc.so_reuseport", 0),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a message.

    `lost`: why there is no reply; empty where the node's stream ended and Flower may still reach the node.
    """

    key: str
    reply: tuple[str, bytes] | None = None
    lost: str = ""


@dataclass
class _Session:
    node: int
    offer: Offer
    link: Link
    waiting: dict[int, str] = field(default_factory=dict)  # numbers of tasks without a reply, and their keys
    connection: asyncio.Task[None] | None = None
    broken: float = 0.0  # since when there is no connection; 0 before the first and while there is one
    lost: float = 0.0  # since when the node counts as lost
    asked: float = 0.0  # when it was sent the newest task

    @property
    def works(self) -> bool:
        """Whether messages may be given to it."""
        away = time.monotonic() - self.broken
        return not self.lost and (self.connection is not None or (self.broken > 0 and away < RECONNECT_S))


class StreamServer:
    """Listens for streams; all methods may be called from one thread that is not its own.

    `address`: ``host:port`` at which nodes find it.
    `listen`: ``host:port`` to listen on, or a folder for a socket named after the server.
    """

    def __init__(self, address: str, listen: str | Path) -> None:
        self.name = new_name()
        self._address = address
        self._listen = f"unix:{socket_of(listen, self.name)}" if isinstance(listen, Path) else listen
        self._socket = socket_of(listen, self.name) if isinstance(listen, Path) else None
        self._sessions: dict[int, _Session] = {}
        self._secrets: dict[bytes, _Session] = {}  # by hash
        self._outcomes: deque[Outcome] = deque()
        self._news = threading.Event()
        self._watch: asyncio.Task[None] | None = None
        self._steps: dict[int, tuple[int, int]] = {}
        self.most_bytes = MOST_BYTES
        self.on_steps: Callable[[dict[int, tuple[int, int]]], None] = lambda steps: None

    def open(self) -> None:
        """Begin to listen.

        Raises `PortError`: the address cannot be listened on.
        """
        try:
            call(self._open())
        except (RuntimeError, OSError) as error:
            raise PortError(f"'stream.listen': cannot listen on {self._listen}: choose another address.") from error

    def close(self) -> None:
        """Take leave of all nodes and stop listening."""
        call(self._close())
        if self._socket:
            self._socket.unlink(missing_ok=True)

    def offer(self, node: int) -> Offer:
        """Make a node's way here; one that was not used yet is given again, any other is void from now on."""
        return call(self._offer(node))

    def works(self, node: int) -> bool:
        """Say whether a node can be reached here."""
        return call(self._works(node))

    def send(self, node: int, key: str, kind: str, payload: bytes, seconds: float) -> None:
        """Send a message to a node that `works`; it has so many seconds."""
        call(self._send(node, key, prepare(kind, payload, min(max(1, round(seconds)), 2**32 - 1))))

    def hidden(self) -> set[int]:
        """Return the nodes that were lost so shortly ago that Flower may not know it yet."""
        return call(self._hidden())

    def keep(self, nodes: Iterable[int]) -> None:
        """End the sessions of all other nodes: Flower does not know them any more."""
        call(self._keep(set(nodes)))

    def outcomes(self) -> list[Outcome]:
        """Take what became of messages since the last call."""
        self._news.clear()
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def wait(self, seconds: float) -> None:
        """Wait until something became of a message, at most so long."""
        self._news.wait(seconds)

    # In the loop's thread

    async def _open(self) -> None:
        key, certificate = make_certificate(self.name)
        self._certificate = certificate.decode()
        self._server = grpc.aio.server(options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self._server.add_secure_port(self._listen, grpc.ssl_server_credentials([(key, certificate)]))
        await self._server.start()
        self._watch = asyncio.ensure_future(self._look())

    async def _close(self) -> None:
        if self._watch:
            self._watch.cancel()
        for session in self._sessions.values():
            session.link.leave(gone=False)
        await self._server.stop(grace=0.5)

    async def _serve(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        secret = str(dict(context.invocation_metadata() or ()).get(SECRET, ""))
        session = self._secrets.pop(_hash(secret.encode()), None)
        if session is None or session.lost:
            if session:
                self._forget(session)  # the node is back: it gets a new offer with the next message by Flower
            else:
                log.warning("a stream was refused: its secret is wrong, or was used before")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown secret")
            return
        if session.connection is not None:
            # The node saw it break before this side did.
            session.connection.cancel()
            await asyncio.gather(session.connection, return_exceptions=True)
        session.link.heard = time.monotonic()
        mine = asyncio.ensure_future(self._converse(session, context))
        session.connection, session.broken = mine, 0.0
        try:
            await asyncio.gather(mine, return_exceptions=True)  # what breaks is no error: the node comes again
        finally:
            mine.cancel()
            if session.connection is mine:
                session.connection, session.broken = None, time.monotonic()

    async def _converse(self, session: _Session, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        fresh = secrets.token_bytes(32)
        self._secrets[_hash(fresh.hex().encode())] = session
        try:
            await context.write(encode(Welcome(fresh)))
            await session.link.run(context.read, context.write)
        except ProtocolError as error:
            log.warning("a node's stream ends: %s", error)
            self._lose(session, str(error))
        if farewell := session.link.farewell:
            if farewell.gone:
                self._lose(session, "its SuperNode is gone")
            else:
                self._forget(session)

    async def _offer(self, node: int) -> Offer:
        before = self._sessions.get(node)
        if before and before.connection is None and not before.broken and not before.lost:
            return before.offer
        if before:
            self._forget(before)
        secret = secrets.token_bytes(32)
        offer = Offer(self._address, self._socket is not None, self.name, self._certificate, secret.hex())

        def expects(part: Part) -> bool:
            return part.note in session.waiting and part.size <= self.most_bytes

        def on_message(message: Incoming) -> None:
            if key := session.waiting.pop(message.note, ""):
                self._tell(Outcome(key, (message.kind, message.payload)))

        session = _Session(node, offer, Link(on_message, expects))
        self._sessions[node] = self._secrets[_hash(offer.secret.encode())] = session
        return offer

    async def _works(self, node: int) -> bool:
        session = self._sessions.get(node)
        return session is not None and session.works

    async def _send(self, node: int, key: str, message: Outgoing) -> None:
        session = self._sessions.get(node)
        if session is None or not session.works:
            self._tell(Outcome(key))
            return
        session.waiting[session.link.send(message)] = key
        session.asked = time.monotonic()

    async def _hidden(self) -> set[int]:
        now = time.monotonic()
        return {session.node for session in self._sessions.values() if session.lost and now - session.lost < HIDDEN_S}

    async def _keep(self, nodes: set[int]) -> None:
        for session in [session for node, session in self._sessions.items() if node not in nodes]:
            self._forget(session)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            for session in list(self._sessions.values()):
                patience = SILENT_S if session.waiting else IDLE_SILENT_S
                if session.connection and now - max(session.link.heard, session.asked) > patience:
                    session.connection.cancel()
                    self._lose(session, f"it gave no sign of life for {patience:.0f} s")
                elif session.waiting and not session.connection and not session.works:
                    self._forget(session)
            self._tell_steps()

    def _tell_steps(self) -> None:
        """Say how far the nodes are in their tasks, where that has changed."""
        working = {session.node: session.link.theirs for session in self._sessions.values() if session.waiting}
        steps = {node: (beat.step, beat.steps) for node, beat in working.items() if beat.steps}
        if steps != self._steps:
            self._steps = steps
            self.on_steps(steps)

    def _lose(self, session: _Session, line: str) -> None:
        """Count a node as lost, and what it still had to do too."""
        session.lost = time.monotonic()
        self._give_up(session, line)

    def _forget(self, session: _Session) -> None:
        """End a session; what its node still had to do may be sent again by Flower."""
        if session.connection:
            session.connection.cancel()
        self._sessions.pop(session.node, None)
        self._secrets = {key: one for key, one in self._secrets.items() if one is not session}
        self._give_up(session, "")

    def _give_up(self, session: _Session, line: str) -> None:
        for key in session.waiting.values():
            self._tell(Outcome(key, lost=line))
        session.waiting.clear()

    def _tell(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._news.set()


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
