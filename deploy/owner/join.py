"""A device owner's side of joining: redeem a token, keep the membership, give it back."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import secrets
import socket
import ssl
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from filelock import FileLock, Timeout

from client_app.history import FILE, History
from deploy.common.address import split_address
from deploy.common.certificates import node_key
from deploy.common.join_token import JOIN, LONGEST, JoinToken, authority_hash, leaving
from deploy.common.paths import home, nodes_folder, private_folder, write_json, write_private
from fedtune_strategies.config.node import NONE, NodeConfig
from fedtune_strategies.config.options import Scalar, section
from fedtune_strategies.errors import ConfigError, LinkError, ProtocolError, ResourceError, error_from_code
from fedtune_strategies.folders import remove_folder
from fedtune_strategies.protocol.door import clean

TIMEOUT = 60.0  # seconds for an answer; over a bad link the handshake alone takes several
ATTEMPTS = 5  # at redeeming a token: a lost answer is no reason to give up, and asking again gives the same one
ENDS_WITHIN = 60.0  # seconds for a node that runs to see that it has left
APPROVAL_PAUSE = 3.0  # seconds between two looks whether the operator has approved


class UnreachableError(LinkError):
    """The server gave no answer; it may have heard the question."""


@dataclass(frozen=True)
class Membership:
    """A federation that this machine joined, as it is kept in ``node.json``."""

    # the node's name; ``host:port`` of the server
    name: str
    address: str
    # the node's configuration, see `fedtune_strategies.config.node.NodeConfig`; empty for the default
    data: str
    format: str = "auto"
    model: str = ""
    device: str = ""
    settings: dict[str, Scalar] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the key, the server's authority and the logs are."""
        return nodes_folder() / f"{self.name}@{self.address.replace(':', '_')}"

    @property
    def authority(self) -> Path:
        """The certificate that the server's must descend from."""
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        """The node's private key."""
        return self.folder / "key"

    def node_config(self) -> NodeConfig:
        """What the node is started with; `ConfigError` for a key that there is not, or a value that it cannot have."""
        own = {"name": self.name, "data": self.data, "format": self.format, "model": self.model, "device": self.device}
        if self.name:
            own["folder"] = str(self.folder)
        # Whoever sets no terms is asked about each run instead.
        if self.name and not self.has_own_terms():
            own["terms.methods"] = NONE
        if twice := own.keys() & self.settings.keys():
            raise ConfigError(f"--set {min(twice)}: this key has its own option, or comes with the token")
        given = {key: value for key, value in own.items() if value}
        return section(NodeConfig, "", {**self.settings, **given}, where="node config")

    def has_own_terms(self) -> bool:
        """Whether the owner set the terms by hand, with ``--set terms.…``."""
        return any(key.startswith("terms.") for key in self.settings)

    @property
    def history(self) -> History:
        """What its owner agreed to, and what left."""
        return History(self.folder)

    @property
    def file(self) -> Path:
        """The membership itself; a node ends when it is gone."""
        return self.folder / "node.json"

    def save(self) -> None:
        """Keep the membership for the next start."""
        private_folder(self.folder)
        write_json(self.file, asdict(self))


def memberships() -> list[Membership]:
    """The federations that this machine joined."""
    files = sorted(nodes_folder().glob("*/node.json"))
    return [Membership(**json.loads(file.read_text())) for file in files]


def find_membership(name: str | None) -> Membership:
    """The membership of a name, or the only one.

    Raises `ConfigError`: there is none, or several.
    """
    found = [one for one in memberships() if name in (None, one.name, one.folder.name)]
    if not found:
        raise ConfigError(
            "this machine has joined no such federation: join with a token, `fedtune join token.txt --data …`"
        )
    if len(found) > 1:
        names = ", ".join(one.folder.name for one in found)
        raise ConfigError(f"this machine has joined several federations: say which by --name: {names}")
    return found[0]


def fetch_server_info(token: JoinToken) -> tuple[str, dict[str, Any]]:
    """Fetch the server's authority, check it against the token, and ask what is tuned there.

    Returns: the authority's certificate (PEM), and the server's facts: ``fedtune``, ``flwr``, ``time``, ``offer``.
    Raises `LinkError`: the server cannot be reached, or is not the one that made the token. Nothing secret was sent
        then.
    """
    # The first connection trusts nobody: it carries no secret, and its one result is checked by its hash.
    authority = str(_ask_again(token.address, {"do": "hello"}, None)["authority"])
    if not secrets.compare_digest(authority_hash(authority), token.authority):
        raise LinkError(
            f"{token.address} is not the server that made this token (its authority differs): do not join; "
            "ask the operator, and check that the address is right"
        )
    return authority, _ask_again(token.address, {"do": "hello", "secret": token.secret.hex()}, authority)


def register(token: JoinToken, authority: str, membership: Membership, on_wait: Any = lambda key: None) -> Membership:
    """Make the node's key, have it registered, and keep the membership.

    `on_wait`: called once with the key's fingerprint if the operator must approve it.
    """
    private_folder(membership.folder)
    _forget_other_key(membership, token)
    public = node_key(membership.folder, "key").public.read_text().strip()
    told, request = False, {"do": "join", "secret": token.secret.hex(), "public_key": public}
    while True:
        answer = _ask_again(token.address, request, authority)
        if answer["state"] == "member":
            write_private(membership.authority, authority.encode())
            membership.save()
            return membership
        if not told:
            on_wait(clean(str(answer["key"])))
            told = True
        time.sleep(APPROVAL_PAUSE)


def is_redeemed(membership: Membership, token: JoinToken) -> bool:
    """Whether this machine has joined with this very token."""
    return membership.file.exists() and _token_file(membership).exists() and not _is_other(membership, token)


def _forget_other_key(membership: Membership, token: JoinToken) -> None:
    """Remove the key of an earlier token: Flower never takes a key again that it has forgotten once."""
    if _is_other(membership, token):
        for file in (membership.key, membership.key.with_suffix(".pub")):
            file.unlink(missing_ok=True)
        write_private(_token_file(membership), _token_hash(token))


def _is_other(membership: Membership, token: JoinToken) -> bool:
    file = _token_file(membership)
    return not file.exists() or file.read_bytes() != _token_hash(token)


def _token_file(membership: Membership) -> Path:
    return membership.folder / "token.sha256"


def _token_hash(token: JoinToken) -> bytes:
    return hashlib.sha256(token.secret).hexdigest().encode()


def unregister(membership: Membership, *, tell_server: bool = True) -> Path | None:
    """Leave a federation: the server forgets the key, the node ends, and this machine forgets the membership.

    Returns: where the record of what left this machine is kept; None where nothing did.
    Raises `LinkError`: the server cannot be reached or refused; nothing was removed here.
    Raises `ResourceError`: the node does not end.
    """
    if tell_server:
        now = int(time.time())
        key = load_ssh_private_key(membership.key.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        signature = key.sign(leaving(membership.name, now), ec.ECDSA(hashes.SHA256()))
        request = {"do": "leave", "name": membership.name, "time": now}
        request["signature"] = base64.b64encode(signature).decode()
        ask(membership.address, request, membership.authority.read_text())
    membership.file.unlink(missing_ok=True)
    try:
        with FileLock(membership.folder / "node.lock", timeout=ENDS_WITHIN):
            return _forget(membership.folder)
    except Timeout:
        raise ResourceError(
            f"the server has forgotten {membership.name}, but its node still runs here: end it, then remove "
            f"{membership.folder}"
        ) from None


def _forget(folder: Path) -> Path | None:
    record, kept = folder / FILE, private_folder(home() / "history") / f"{folder.name}-{int(time.time())}.jsonl"
    if record.exists():
        record.replace(kept)
    remove_folder(folder)
    return kept if kept.exists() else None


def ask(address: str, request: dict[str, Any], authority: str | None) -> dict[str, Any]:
    """Ask the desk of a server.

    `authority`: PEM certificate that the server's must descend from; None trusts anybody.
    Raises `FedTuneError`: the server refused; its reason.
    Raises `LinkError`: it cannot be reached or trusted.
    """
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority:
        context.load_verify_locations(cadata=authority)
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([JOIN])
    try:
        with (
            socket.create_connection((host, port), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as link,
        ):
            link.sendall(json.dumps(request).encode() + b"\n")
            with link.makefile("rb") as stream:
                answer = json.loads(stream.readline(LONGEST))
    except ssl.SSLCertVerificationError as error:
        raise LinkError(
            f"the certificate of {address} is not valid for it ({error.verify_message}): check this machine's clock, "
            "and that the operator's --address is the one that you connect to"
        ) from None
    except socket.gaierror:
        raise LinkError(f"{host}: no machine of that name is known here: check the address, and DNS") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or ("no answer" if isinstance(error, TimeoutError) else str(error))
        raise UnreachableError(
            f"cannot talk to the server at {address} ({reason}): check that it runs, and that firewalls on the way let "
            f"TCP port {port} through"
        ) from None
    if not isinstance(answer, dict):
        raise ProtocolError(f"{address} answered nonsense: is it a FedTune server?")
    if "error" in answer:
        code = answer["error"]
        raise error_from_code(code if isinstance(code, int) else 1, clean(str(answer.get("message", ""))))
    return answer


def _ask_again(address: str, request: dict[str, Any], authority: str | None) -> dict[str, Any]:
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(UnreachableError):
            return ask(address, request, authority)
        time.sleep(1.0)
    return ask(address, request, authority)
