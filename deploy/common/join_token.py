"""What both sides of joining agree on: the token, one line of text that joins once, and the words at the desk."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import ssl
import struct
import time
import zlib
from dataclasses import dataclass, field

from fedtune_strategies.errors import LinkError
from fedtune_strategies.protocol.door import check_name, clean

JOIN = "fedtune-join"  # the application protocol by which the published port knows joiners
LONGEST = 1 << 16  # bytes of a request or an answer, one line of JSON
PREFIX = "fedtune1-"
_ADDRESS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_HEAD = struct.Struct(">32s16sIB")  # fingerprint, secret, expiry, length of the name


@dataclass(frozen=True)
class JoinToken:
    """What a node must know to join.

    `address`: ``host:port`` of the server's one published port.
    `name`: name that the node gets.
    `authority`: SHA-256 of the federation's certificate authority (DER), 32 bytes.
    `secret`: registration secret, 16 bytes; good for one key. Left out of every representation.
    Raises `ProtocolError`, `LinkError`: name or address is none: they become the name of a folder, lines of a unit and
        words on a terminal.
    """

    address: str
    name: str
    authority: bytes
    secret: bytes = field(repr=False)
    expires: int

    def __post_init__(self) -> None:
        check_name(self.name)
        check_address(self.address)

    def encode(self) -> str:
        """Return the token as one word: base64 with a check sum."""
        name = self.name.encode()
        body = _HEAD.pack(self.authority, self.secret, self.expires, len(name)) + name + self.address.encode()
        return PREFIX + base64.urlsafe_b64encode(body + struct.pack(">I", zlib.crc32(body))).rstrip(b"=").decode()

    def check_time(self, now: float | None = None) -> None:
        """Raise `LinkError` if the token has expired by this machine's clock."""
        late = (time.time() if now is None else now) - self.expires
        if late > 0:
            raise LinkError(
                f"this join token expired {late / 3600:.1f} hours ago by this machine's clock: ask the operator for "
                f"another (`fedtune nodes invite {self.name}`)"
            )


def decode_token(text: str) -> JoinToken:
    """Read a token; an error never quotes it."""
    word = "".join(text.split())
    if not word.startswith(PREFIX):
        raise LinkError(f"this is no join token: it must begin with {PREFIX}, as `fedtune serve` printed it")
    try:
        data = word.removeprefix(PREFIX).encode()
        raw = base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4))
        body, (check,) = raw[:-4], struct.unpack(">I", raw[-4:])
        authority, secret, expires, length = _HEAD.unpack_from(body)
        rest = body[_HEAD.size :]
        name, address = rest[:length].decode(), rest[length:].decode()
    except (binascii.Error, struct.error, UnicodeDecodeError):
        check, body = 1, b""
    if zlib.crc32(body) != check:
        raise LinkError("this join token is not whole: copy it again, from its first to its last character")
    return JoinToken(address, name, authority, secret, expires)


def check_address(address: str) -> str:
    """Return ``host:port`` if it is one, of plain letters; raise `LinkError` otherwise."""
    if not _ADDRESS.fullmatch(address):
        raise LinkError(
            f"the address {clean(address, 60)!r} of the server is not host:port: ask the operator for another"
        )
    return address


def authority_hash(certificate: str) -> bytes:
    """SHA-256 of a certificate's DER, by which a token names the authority."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).digest()


def leaving(name: str, at: int) -> bytes:
    """What a node signs to leave."""
    return f"fedtune leave {name} {at}".encode()
