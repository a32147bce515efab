"""Where a run's stream is and the secret that opens it: what a node gets over Flower, which knows whom it tells."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedtune_strategies.errors import ProtocolError

# What `fedtune serve` tells its ServerApps: where nodes reach it, and the folder of the sockets behind that port.
# `fedtune join` tells its node the first: the server's address as that machine knows it.
STREAM_ADDRESS, STREAM_FOLDER = "FEDTUNE_STREAM_ADDRESS", "FEDTUNE_STREAM_FOLDER"

_NAME = re.compile(r"([0-9a-f]{16})\.stream\.fedtune")
_ADDRESS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_SECRET = re.compile(r"[0-9a-f]{64}")
_LONGEST = 4096  # characters of a certificate


@dataclass(frozen=True)
class Offer:
    """One node's way to a run's stream.

    `shared`: whether that is the port at which the server is joined, too: a node that joined there keeps to its own
        address.
    `name`: the name in the server's certificate, new with every start of a ServerApp.
    `certificate`: PEM; the only one that the node believes there.
    `secret`: opens one connection, in the name of the node that Flower gave the offer to. Left out of every
        representation.
    Raises `ProtocolError`: a field is not of that form.
    """

    address: str
    shared: bool
    name: str
    certificate: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        texts = (self.address, self.name, self.certificate, self.secret)
        sound = isinstance(self.shared, bool) and all(isinstance(text, str) for text in texts)
        sound = sound and bool(
            is_address(self.address)
            and _NAME.fullmatch(self.name)
            and _SECRET.fullmatch(self.secret)
            and len(self.certificate) <= _LONGEST
        )
        if not sound:
            raise ProtocolError("received a damaged offer of a stream.")

    def encode(self) -> str:
        """Return the offer as JSON."""
        return json.dumps(asdict(self))


def decode_offer(text: str) -> Offer:
    """Read an offer; `ProtocolError` where it is none."""
    try:
        return Offer(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise ProtocolError("received a damaged offer of a stream.") from None


def is_address(text: str) -> bool:
    """Say whether a text is ``host:port``."""
    return bool(_ADDRESS.fullmatch(text))


def new_name() -> str:
    """Return the name of a new stream server; nobody can guess it."""
    return f"{secrets.token_hex(8)}.stream.fedtune"


def socket_of(folder: Path, name: str) -> Path | None:
    """Return the socket behind which a server of this name answers on this machine; None where it is no such name."""
    found = _NAME.fullmatch(name)
    return folder / found[1] if found else None
