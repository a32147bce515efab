"""A Flower Grid over two ways: the nodes' streams, and Flower's messages for nodes without one."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedtune_strategies.protocol.flower import WrappedGrid
from fedtune_strategies.protocol.records import for_flower, from_record, to_record, with_offer
from fedtune_strategies.stream.offer import STREAM_ADDRESS, STREAM_FOLDER
from fedtune_strategies.stream.server import Outcome, StreamServer

if TYPE_CHECKING:
    from fedtune_strategies.config.sections import StreamConfig

log = logging.getLogger("fedtune")

_UNAVAILABLE = 5  # Flower's code for a node that is gone


class StreamedReply(Message):
    """A reply that came over its node's stream."""


class StreamGrid(WrappedGrid):
    """Reaches every node by its stream where there is one, and by Flower where there is none.

    What goes by Flower brings the node an offer of a stream, so that the next message can go that way. A task whose
    stream ended is sent again by Flower, unless the node is known to be gone.

    `grid`: Flower's grid; it says which nodes there are.
    `server`: open; None where Flower carries everything.
    """

    def __init__(self, grid: Grid, server: StreamServer | None) -> None:
        super().__init__(grid)
        self._server = server
        self._numbers = itertools.count(1)
        self._sent: dict[str, Message] = {}  # over streams, without a reply that was taken
        self._replies: dict[str, Message] = {}
        self._again: dict[str, str] = {}  # what was sent again by Flower: Flower's id, and the one that is waited for

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """See Flower."""
        self._expire()
        messages = list(messages)
        ids = [self._stream(message) for message in messages]
        others = iter(self._by_flower([message for message, key in zip(messages, ids, strict=True) if not key]))
        return [key or next(others) for key in ids]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """See Flower; asks Flower about its own messages alone."""
        for outcome in self._server.outcomes() if self._server else ():
            self._settle(outcome)
        wanted = set(message_ids)
        again = {key: flower for flower, key in self._again.items() if key in wanted}
        theirs = [again.get(key, key) for key in wanted if key in again or key not in self._sent]
        for reply in self._grid.pull_messages(theirs) if theirs else ():
            key = self._again.pop(reply.metadata.reply_to_message_id, reply.metadata.reply_to_message_id)
            reply.metadata.__dict__["_reply_to_message_id"] = key
            self._replies[key] = reply
        found = [self._replies.pop(key) for key in wanted if key in self._replies]
        for reply in found:
            self._sent.pop(reply.metadata.reply_to_message_id, None)
        return found

    def get_node_ids(self) -> list[int]:
        """Return the nodes that Flower knows, without those whose stream fell silent a moment ago."""
        present = list(self._grid.get_node_ids())
        if self._server is None:
            return present
        self._server.keep(present)
        hidden = self._server.hidden()
        return [node for node in present if node not in hidden]

    def wait(self, seconds: float) -> None:
        """Wait for something new on a stream, at most so long."""
        if self._server:
            self._server.wait(seconds)
        else:
            super().wait(seconds)

    def watch_steps(self, tell: Callable[[dict[int, tuple[int, int]]], None]) -> None:
        """See `WrappedGrid`; told from the streams' thread."""
        if self._server:
            self._server.on_steps = tell

    def allow_replies(self, size: int) -> None:
        """See `WrappedGrid`."""
        if self._server:
            self._server.most_bytes = max(self._server.most_bytes, size)

    def _stream(self, message: Message) -> str:
        """Send a message over its node's stream; returns its id, or nothing where there is no stream."""
        metadata = message.metadata
        if self._server is None or not self._server.works(metadata.dst_node_id):
            return ""
        key = f"stream-{next(self._numbers)}"
        metadata.__dict__["_message_id"] = key
        self._sent[key] = message
        self._server.send(metadata.dst_node_id, key, *from_record(message.content), metadata.ttl)
        return key

    def _by_flower(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.content = for_flower(message.content)
            if self._server:
                offer = self._server.offer(message.metadata.dst_node_id)
                message.content = with_offer(message.content, offer.encode())
        return list(self._grid.push_messages(messages)) if messages else []

    def _settle(self, outcome: Outcome) -> None:
        task = self._sent.get(outcome.key)
        if task is None:
            return
        if outcome.reply is not None:
            self._replies[outcome.key] = StreamedReply(to_record(*outcome.reply), reply_to=task)
        elif outcome.lost:
            reason = f"its stream is lost: {outcome.lost}"
            self._replies[outcome.key] = StreamedReply(Error(code=_UNAVAILABLE, reason=reason), reply_to=task)
        else:
            (flower,) = self._by_flower([task])
            self._again[flower] = outcome.key

    def _expire(self) -> None:
        """Forget messages whose time is over: nobody will ask for their replies."""
        now = time.time()
        over = [key for key, one in self._sent.items() if one.metadata.created_at + one.metadata.ttl < now]
        for key in over:
            del self._sent[key]
            self._replies.pop(key, None)
        self._again = {flower: key for flower, key in self._again.items() if key in self._sent}


@contextlib.contextmanager
def streaming(grid: Grid, config: StreamConfig) -> Iterator[StreamGrid]:
    """Open streams beside Flower's messages, where the configuration or `fedtune serve` says how nodes reach them.

    Raises `PortError`: ``stream.listen`` cannot be listened on.
    """
    server = _server(config)
    if server is None:
        yield StreamGrid(grid, None)
        return
    server.open()
    try:
        yield StreamGrid(grid, server)
    finally:
        server.close()


def _server(config: StreamConfig) -> StreamServer | None:
    place, folder = os.environ.get(STREAM_ADDRESS), os.environ.get(STREAM_FOLDER)
    if config.listen and config.listen != "off":
        return StreamServer(config.address or config.listen, config.listen)
    if place and folder and not config.listen:
        return StreamServer(place, Path(folder))
    return None
