"""The desk: where a join token is redeemed and a membership given back, over TLS, one JSON line each way.

The node makes its key itself and sends the public half; the desk registers it with the SuperLink. Secrets are
compared by hash and never written anywhere. It has its own socket loop: no HTTP server at hand ends a silent TLS
handshake in seconds, and whoever has not asked yet may take no place.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from deploy.common.certificates import ServerFiles
from deploy.common.flower_cli import Control, key_words
from deploy.common.join_token import JOIN, LONGEST, leaving
from deploy.operator.members import GONE, Members, admit
from fedtune_strategies.errors import FedTuneError, LinkError, ProtocolError

PATIENCE = 10.0  # seconds for a handshake, and for a request to arrive
CLOCKS = 300.0  # seconds by which a leaving node's clock may differ
MOST_AT_ONCE = 16  # requests that are answered at a time; who has not asked yet takes no place


class RegistrationServer:
    """Answers joiners.

    `offer`: gives what the operator announces: the keys of the run configuration that are set.
    `approval`: let every node wait for ``fedtune nodes approve``.
    `on_event`: called with a line about everything that changed.
    """

    def __init__(
        self,
        server: ServerFiles,
        members: Members,
        control: Control,
        *,
        offer: Callable[[], dict[str, Any]] = dict,
        approval: bool = False,
        on_event: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._server, self._members, self._control = server, members, control
        self._offer, self._approval, self._on_event = offer, approval, on_event
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        """Begin to listen on a free port of 127.0.0.1; returns the port."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._server.certificate, self._server.key)
        context.set_alpn_protocols([JOIN])
        self._listener = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=context, ssl_handshake_timeout=PATIENCE, limit=LONGEST, backlog=1024
        )
        return int(self._listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, and hang up."""
        if self._listener:
            self._listener.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        with (
            contextlib.suppress(OSError, ValueError, TimeoutError, asyncio.CancelledError),
            contextlib.closing(writer),
        ):
            line = await asyncio.wait_for(reader.readline(), PATIENCE)
            async with self._places:
                answer = await asyncio.to_thread(self.answer, line)
            writer.write(json.dumps(answer).encode() + b"\n")
            await asyncio.wait_for(writer.drain(), PATIENCE)

    def answer(self, line: bytes) -> dict[str, Any]:
        """Answer one request; an error becomes ``{"error": exit code, "message": line}``."""
        try:
            request = json.loads(line)
            match request.get("do"):
                case "hello":
                    return self._hello(str(request.get("secret", "")))
                case "join":
                    return self._join(_text(request, "secret"), _text(request, "public_key"))
                case "leave":
                    return self._leave(_text(request, "name"), request.get("time"), _text(request, "signature"))
            raise ProtocolError("the server does not understand this request: install the same FedTune version on both")
        except FedTuneError as error:
            return {"error": error.exit_code, "message": str(error)}
        except (ValueError, AttributeError, TypeError):
            return {"error": ProtocolError.exit_code, "message": "the server could not read this request"}

    def _hello(self, secret: str) -> dict[str, Any]:
        # What is tuned here is told to those who were invited alone.
        offer = self._offer() if secret and self._members.knows(bytes.fromhex(secret)) else {}
        return {
            "authority": self._server.authority.read_text(),
            "fedtune": version("fedtune"),
            "flwr": version("flwr"),
            "time": time.time(),
            "offer": offer,
        }

    def _join(self, secret: str, public_key: str) -> dict[str, Any]:
        member = self._members.apply(bytes.fromhex(secret), public_key, approval=self._approval)
        if member.state == "approved":
            member = admit(self._members, member, self._register, self._control.unregister)
            self._on_event(f"{member.name} joined with key {member.fingerprint}")
        return {"state": member.state, "name": member.name, "key": member.fingerprint}

    def _register(self, public_key: str, name: str) -> int:
        with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
            file.write(public_key + "\n")
            file.flush()
            try:
                return self._control.register(Path(file.name), name)
            except LinkError:
                # Perhaps it is registered already, by a server that was killed before it could write that down.
                if node_id := self._control.registered_keys().get(key_words(public_key)):
                    return node_id
                raise

    def reconcile(self) -> None:
        """Make the SuperLink's list equal to ours, after anything was cut short between the two."""
        known = self._control.registered_keys()
        for member in self._members.all().values():
            node_id = known.pop(key_words(member.public_key), 0) if member.state in ("approved", "member") else 0
            if member.state == "member" and node_id != member.node_id:
                member = self._members.change(member.name, "approved", expected=("member",), node_id=0)
            if member.state == "approved":
                admit(self._members, member, self._register, self._control.unregister)
                self._on_event(f"{member.name} joined with key {member.fingerprint}")
        for node_id in known.values():
            self._control.unregister(node_id)
            self._on_event(f"node {node_id} is no member (any more): its key is forgotten")

    def _leave(self, name: str, at: Any, signature: str) -> dict[str, Any]:
        member = self._members.all().get(name)
        if not isinstance(at, int) or abs(time.time() - at) > CLOCKS:
            raise LinkError("the clocks of this machine and of the server differ by more than five minutes: set yours")
        # One answer for a wrong key and for a name that there is not: strangers learn no names.
        key = load_ssh_public_key(member.public_key.encode()) if member and member.public_key else None
        assert key is None or isinstance(key, ec.EllipticCurvePublicKey)
        try:
            if key is None:
                raise InvalidSignature
            key.verify(base64.b64decode(signature), leaving(name, at), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise LinkError("only the holder of a member's key can give its membership back") from None
        revoke(self._members, self._control, name, "left")
        self._on_event(f"{name} left")
        return {"state": "left"}


def revoke(members: Members, control: Control, name: str, state: str = "revoked") -> None:
    """End a membership: the token is void, and the SuperLink forgets the key."""
    member = members.change(name, state, expected=("invited", "waiting", "approved", "member", *GONE))
    if member.node_id:
        control.unregister(member.node_id)
        members.change(name, state, expected=(state,), node_id=0)


def _text(request: dict[str, Any], key: str) -> str:
    if not isinstance(request.get(key), str):
        raise ProtocolError(f"the request lacks {key!r}: install the same FedTune version on both")
    return str(request[key])
