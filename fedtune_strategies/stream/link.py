"""One side of a session: what it has to send and what it has received, over however many connections."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.stream.frames import PART_BYTES, Beat, Bye, Frame, Part, Received, decode, digest_of, encode

# gRPC's async calls have the same two methods on both sides; what is read at the end is not bytes.
Read = Callable[[], Awaitable[Any]]
Write = Callable[[bytes], Awaitable[None]]


class Outgoing(NamedTuple):
    """A message to be sent; `prepare` makes it."""

    kind: str
    payload: bytes
    note: int
    digest: bytes


class Incoming(NamedTuple):
    """A message that has arrived whole."""

    number: int
    note: int
    kind: str
    payload: bytes


def prepare(kind: str, payload: bytes, note: int) -> Outgoing:
    """Make a message ready to be sent; hashing a large one takes a second."""
    return Outgoing(kind, payload, note, digest_of(payload))


class Link:
    """One side of a session, in one event loop.

    A message is kept until the other side has it whole, and sent one after another. A connection begins with each side
    saying how far it has got, so that the next one continues in the middle of a message.

    `on_message`: called with every message that has arrived whole.
    `expects`: called with a message's first part: whether it may come. One that may not breaks the connection.
    `beat`, `idle_beat`: seconds after which to send a sign of life where there is nothing else to send: between the
        first part of a message and its reply, and at other times. 0 for none.
    `step`: how far this side is in its task, as a sign of life says it: steps begun, and all of them.
    `theirs`: how far the other side is in its task.
    """

    def __init__(
        self,
        on_message: Callable[[Incoming], None],
        expects: Callable[[Part], bool] = lambda part: True,
        beat: float = 0.0,
        idle_beat: float = 0.0,
        step: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._on_message, self._expects, self._step = on_message, expects, step
        self._beat, self._idle_beat = beat, idle_beat
        self._unanswered = 0  # messages begun by the other side, less those sent
        self._queue: deque[tuple[int, Outgoing]] = deque()  # with their numbers; not received whole yet
        self._begun = 0  # number of the newest message sent
        self._notices: deque[Frame] = deque()
        self._wake = asyncio.Event()
        self._next: tuple[int, int] = (1, 0)  # message and byte to send next on this connection
        self._got = Received(0, 0)
        self._total = 0  # size of the message that `_got` is about
        self._buffer = io.BytesIO()  # hands over its bytes without a copy
        self._hash = hashlib.sha256()
        self.heard = time.monotonic()
        self.theirs = Beat()
        self.left = False
        self.farewell: Bye | None = None  # the other side's

    def send(self, message: Outgoing) -> int:
        """Send a message as soon as there is a connection; returns its number."""
        self._begun += 1
        self._unanswered -= 1
        self._queue.append((self._begun, message))
        self._wake.set()
        return self._begun

    def leave(self, gone: bool) -> None:
        """Say that the session ends on purpose."""
        self.left = True
        self._notices.append(Bye(gone))
        self._wake.set()

    async def run(self, read: Read, write: Write) -> None:
        """Keep to one connection until it ends or the other side takes its leave.

        Raises `ProtocolError`: the other side does not keep to the rules.
        """
        self.heard = time.monotonic()
        self._notices.clear()
        await write(encode(self._got))
        first = await self.frame(read)
        if not isinstance(first, Received):
            return
        self._resume(first)
        sending = asyncio.ensure_future(self._send(write))
        try:
            while frame := await self.frame(read):
                match frame:
                    case Part():
                        self._take(frame)
                    case Received():
                        self._drop(frame)
                    case Bye():
                        self.farewell = frame
                        return
                    case Beat():
                        self.theirs = frame
                    case _:
                        raise ProtocolError("received a frame out of place.")
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def frame(self, read: Read, seconds: float | None = None) -> Frame | None:
        """Read a frame; None at the end of the connection."""
        data = await asyncio.wait_for(read(), seconds)
        self.heard = time.monotonic()
        return decode(data) if isinstance(data, bytes) else None

    # Sending

    def _resume(self, theirs: Received) -> None:
        self._drop(theirs)
        # What they have of the first message that is left need not be sent again.
        first = self._queue[0][0] if self._queue else self._begun + 1
        self._next = (first, theirs.size if first == theirs.number else 0)

    def _drop(self, theirs: Received) -> None:
        """Forget what the other side has whole."""
        while self._queue:
            number, message = self._queue[0]
            whole = number < theirs.number or (number == theirs.number and theirs.size >= len(message.payload))
            if not whole:
                return
            self._queue.popleft()

    async def _send(self, write: Write) -> None:
        while True:
            self._wake.clear()
            frame = self._notices.popleft() if self._notices else self._part()
            if frame is None:
                beat = self._beat if self._unanswered > 0 else self._idle_beat
                try:
                    await asyncio.wait_for(self._wake.wait(), beat or None)
                    continue
                except TimeoutError:
                    frame = Beat(*self._step())
            await write(encode(frame))

    def _part(self) -> Part | None:
        """Cut off the next part of the message in turn."""
        number, start = self._next
        message = next((message for there, message in self._queue if there == number), None)
        if message is None:
            return None
        data = memoryview(message.payload)[start : start + PART_BYTES]
        end = start + len(data)
        self._next = (number, end) if end < len(message.payload) else (number + 1, 0)
        return Part(number, message.note, len(message.payload), start, message.digest, message.kind, data)

    # Receiving

    def _take(self, part: Part) -> None:
        begins = part.number == self._got.number + 1 and part.start == 0 and self._got.size == self._total
        if begins:
            if not self._expects(part):
                raise ProtocolError("received a message that was not asked for.")
            self._buffer, self._hash, self._total = io.BytesIO(), hashlib.sha256(), part.size
            self._unanswered += 1
            self.theirs = Beat()
            self._wake.set()
        elif (part.number, part.start, part.size) != (self._got.number, self._got.size, self._total):
            raise ProtocolError("received a part of a message out of its order.")
        self._buffer.write(part.data)
        self._hash.update(part.data)
        self._got = Received(part.number, part.start + len(part.data))
        if self._got.size < part.size:
            return
        if self._hash.digest()[: len(part.digest)] != part.digest:
            raise ProtocolError("received a message whose parts do not make its hash.")
        payload, self._buffer = self._buffer.getvalue(), io.BytesIO()
        self._notices.append(self._got)
        self._wake.set()
        self._on_message(Incoming(part.number, part.note, part.kind, payload))
