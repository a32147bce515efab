"""Typed messages in and out of Flower's: the place where `messages` and `records` meet; and a Grid over another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune_strategies.errors import NodesError, ProtocolError, error_from_code
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.door import clean, refusing
from fedtune_strategies.protocol.records import from_record, to_record

T = TypeVar("T", bound=protocol.Message)


def task(node_id: int, message: protocol.Message, round: int) -> Message:
    """Address a protocol message to a node; the round is shown in Flower's logs."""
    return address(node_id, message.kind, protocol.encode(message), round)


def address(node_id: int, kind: str, payload: bytes, round: int) -> Message:
    """Address an encoded message to a node; encode once to send the same to many."""
    return Message(to_record(kind, payload), node_id, MessageType.TRAIN, group_id=str(round))


class Deferred(Message):
    """A task that is made and encoded when its turn comes: of a node's many large ones, one is in memory."""

    def __init__(self, node_id: int, kind: str, make: Callable[[], protocol.Message], round: int) -> None:
        super().__init__(to_record(kind, b""), node_id, MessageType.TRAIN, group_id=str(round))
        self._kind, self._make = kind, make

    def made(self) -> Message:
        """Return what it stands for: a plain message, since Flower writes a message's class into what it sends."""
        content = to_record(self._kind, protocol.encode(self._make()))
        own = self.metadata
        return Message(content, own.dst_node_id, own.message_type, ttl=own.ttl, group_id=own.group_id)


def query(node_id: int, message: protocol.Message, seconds: float) -> Message:
    """Address a question to a node that takes no part yet; it is given up after so many seconds."""
    return Message(to_record(message.kind, protocol.encode(message)), node_id, MessageType.QUERY, ttl=seconds)


def decoded(content: RecordDict, expected: type[T]) -> T:
    """Decode the content of a Flower message.

    Parameters
    ----------
    content : RecordDict
        The content.
    expected : type
        The message type that must come out.

    Returns
    -------
    Message
        The message.

    Raises
    ------
    ProtocolError
        The content is damaged or of another type.
    """
    message = protocol.decode(*from_record(content))
    if not isinstance(message, expected):
        raise ProtocolError(f"received a '{message.kind}' instead of a '{expected.kind}'.")
    return message


def answer(reply: Message) -> protocol.Message:
    """Decode a node's reply, or raise what the node failed with; Flower's own errors are a NodesError."""
    if reply.has_error():
        reason = clean(reply.error.reason or "") or "no reason given"
        raise NodesError(f"did not answer: {reason} (code {reply.error.code}).")
    with refusing():
        message = protocol.decode(*from_record(reply.content))
    if isinstance(message, protocol.Failure):
        raise error_from_code(message.exit_code, message.message)
    return message


class WrappedGrid(Grid):
    """A Flower ``Grid`` over another: what all of ours have alike."""

    def __init__(self, grid: Grid, poll_interval: float = 0.25) -> None:
        self._grid = grid
        self._poll_interval = poll_interval

    def wait(self, seconds: float) -> None:
        """Wait until there may be a reply to take, at most so long."""
        if isinstance(self._grid, WrappedGrid):
            self._grid.wait(seconds)
        else:
            time.sleep(seconds)

    def watch_steps(self, tell: Callable[[dict[int, tuple[int, int]]], None]) -> None:
        """Have it told now and then how far nodes are: steps begun of how many, by node; only streams say it."""
        if isinstance(self._grid, WrappedGrid):
            self._grid.watch_steps(tell)

    def allow_replies(self, size: int) -> None:
        """Let a reply have so many bytes; by default only what fits any but a large model comes over a stream."""
        if isinstance(self._grid, WrappedGrid):
            self._grid.allow_replies(size)

    def set_run(self, run: Run) -> None:
        """See Flower."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """See Flower."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See Flower."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """See Flower; replies are collected promptly."""
        pending = set(self.push_messages(messages))
        limit = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while pending and time.monotonic() < limit:
            arrived = list(self.pull_messages(list(pending)))
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                self.wait(self._poll_interval)
        return replies
