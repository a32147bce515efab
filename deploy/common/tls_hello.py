"""What a TLS client says first: whom it wants to talk to, and in which protocols. Nothing is decrypted for that."""

from __future__ import annotations

import asyncio
import struct

_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _ALPN = 22, 1, 0, 16


async def read_hello(reader: asyncio.StreamReader) -> bytes:
    """Read the first TLS record, which holds the client's hello; a ValueError where it is something else."""
    head = await reader.readexactly(5)
    kind, _, length = struct.unpack(">BHH", head)
    if kind != _HANDSHAKE or not 0 < length <= 1 << 14:
        raise ValueError("no TLS handshake")
    return head + await reader.readexactly(length)


def protocols(hello: bytes) -> list[str]:
    """Return the application protocols that a client's hello offers, in its order (RFC 7301 section 3.1)."""
    names, found, at = _extensions(hello).get(_ALPN, b"")[2:], [], 0
    while at < len(names):
        found.append(names[at + 1 : at + 1 + names[at]].decode("latin-1"))
        at += 1 + names[at]
    return found


def server_name(hello: bytes) -> str:
    """Return the host name that a client's hello asks for (RFC 6066 section 3); empty where it names none."""
    entry = _extensions(hello).get(_SERVER_NAME, b"")  # length of the list, kind of the name, length, name
    return entry[5 : 5 + int.from_bytes(entry[3:5], "big")].decode("latin-1")


def _extensions(hello: bytes) -> dict[int, bytes]:
    """Return the extensions of a client's hello by their number (RFC 8446 section 4.1.2)."""
    found: dict[int, bytes] = {}
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
            found[kind] = hello[at + 4 : at + 4 + length]
            at += 4 + length
    except (IndexError, struct.error):
        raise ValueError("a client hello that is not whole") from None
    return found
