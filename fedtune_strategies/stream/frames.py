"""What travels on a stream: a frame is one gRPC message of at most `PART_BYTES` and a few more.

Messages are cut into parts, each with the SHA-256 of the whole, so that two halves that came over two connections are
known to belong together. Numbers count one side's messages within one session, from 1.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TypeAlias

from fedtune_strategies.errors import ProtocolError

SERVICE, METHOD = "fedtune.Stream", "Open"
SECRET = "fedtune-secret"  # the metadata that opens a stream
PART_BYTES = 128 * 2**10  # on the slowest link of interest a part takes less than the silence that counts as a loss
_PART = struct.Struct(">BIIQQ16sB")
_RECEIVED = struct.Struct(">BIQ")
_BEAT = struct.Struct(">BII")
_WELCOME = struct.Struct(">B32s")
_BYE = struct.Struct(">B?")
PART, RECEIVED, BEAT, WELCOME, BYE = range(5)
LONGEST_FRAME = _PART.size + 255 + PART_BYTES


@dataclass(frozen=True)
class Part:
    """A stretch of a message.

    `number`: the message's number among its sender's.
    `note`: of a task: the seconds that it may take; of a reply: the number of the task.
    `size`, `start`: bytes of the whole message, and where this part begins.
    `digest`: first half of the SHA-256 of the whole message.
    `kind`: kind of the message, see `fedtune_strategies.protocol.messages`.
    """

    number: int
    note: int
    size: int
    start: int
    digest: bytes
    kind: str
    data: memoryview


@dataclass(frozen=True)
class Received:
    """How far its sender has got with the other side's messages: this one up to so many bytes, all before it whole."""

    number: int
    size: int


@dataclass(frozen=True)
class Beat:
    """The sender is alive, and has begun so many of its task's steps; 0 of 0 where it does not say."""

    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Welcome:
    """The connection is accepted; the secret opens the next one, should this one break."""

    secret: bytes


@dataclass(frozen=True)
class Bye:
    """The sender ends the session on purpose; ``gone`` where its SuperNode is gone too."""

    gone: bool


Frame: TypeAlias = Part | Received | Beat | Welcome | Bye


def encode(frame: Frame) -> bytes:
    """Turn a frame into bytes."""
    match frame:
        case Part():
            kind = frame.kind.encode()
            head = _PART.pack(PART, frame.number, frame.note, frame.size, frame.start, frame.digest, len(kind))
            return b"".join([head, kind, frame.data])
        case Received():
            return _RECEIVED.pack(RECEIVED, frame.number, frame.size)
        case Welcome():
            return _WELCOME.pack(WELCOME, frame.secret)
        case Bye():
            return _BYE.pack(BYE, frame.gone)
        case Beat():
            return _BEAT.pack(BEAT, frame.step, frame.steps)


def decode(data: bytes) -> Frame:
    """Turn bytes into a frame.

    Raises `ProtocolError`: they are none.
    """
    try:
        match data[0]:
            case 0:
                _, number, note, size, start, digest, length = _PART.unpack_from(data)
                rest = memoryview(data)[_PART.size :]
                kind, content = bytes(rest[:length]).decode(), rest[length:]
                if start + len(content) > size or (size and not content):
                    raise ProtocolError("received a part of a message beyond its end.")
                return Part(number, note, size, start, digest, kind, content)
            case 1:
                return Received(*_RECEIVED.unpack(data)[1:])
            case 2:
                _, step, steps = _BEAT.unpack(data)
                if step > steps:
                    raise ProtocolError("received a step beyond the last one.")
                return Beat(step, steps)
            case 3:
                return Welcome(_WELCOME.unpack(data)[1])
            case 4:
                return Bye(_BYE.unpack(data)[1])
    except (IndexError, struct.error, UnicodeDecodeError):
        pass
    raise ProtocolError("received what is no frame of a stream.")


def digest_of(payload: bytes) -> bytes:
    """Return what a message's parts carry of its hash."""
    return hashlib.sha256(payload).digest()[:16]
