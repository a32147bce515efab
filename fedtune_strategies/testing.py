"""A federation in one process: drive a strategy without a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune_strategies.protocol.records import from_record, to_record

Handler = Callable[[str, bytes], tuple[str, bytes]]
"""What answers for a node: (kind, payload) to (kind, payload). `Lost` is no reply, other exceptions an error reply."""


class Lost(Exception):  # noqa: N818
    """Raised by a `Handler` whose reply never arrives."""


class InMemoryGrid(Grid):
    """A Grid whose nodes are functions. Messages pass through the same records as over the network.

    Parameters
    ----------
    nodes : mapping of int to Handler
        The nodes by id; may change during a run.
    newest_first : bool
        Deliver replies in the opposite order of their tasks.
    """

    def __init__(self, nodes: Mapping[int, Handler], *, newest_first: bool = False) -> None:
        self.nodes = nodes
        self._newest_first = newest_first
        self._run = Run.create_empty(1)
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        # Inside a federation Flower sets these before an app makes its first message.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        """See Flower."""
        self._run = run

    @property
    def run(self) -> Run:
        """See Flower."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See Flower."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer every message at once."""
        return [self._answer(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the first reply to some messages, as a network would bring them: one after the other."""
        wanted = list(message_ids)
        ordered = reversed(wanted) if self._newest_first else wanted
        return [self._replies.pop(key) for key in [key for key in ordered if key in self._replies][:1]]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """See Flower."""
        wanted = self.push_messages(messages)
        return [reply for _ in wanted for reply in self.pull_messages(wanted)]

    def _answer(self, message: Message) -> str:
        message_id = f"message-{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        try:
            content = to_record(*self.nodes[message.metadata.dst_node_id](*from_record(message.content)))
            self._replies[message_id] = Message(content, reply_to=message)
        except Lost:
            pass
        except Exception as error:  # as Flower does with what a ClientApp raises
            self._replies[message_id] = Message(Error(code=2, reason=str(error)), reply_to=message)
        return message_id
