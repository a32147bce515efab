"""The nodes of a run, known by name, and the prompt way to reach them.

`Fleet` is a Flower ``Grid`` over another one. It shows strategies only the nodes that were admitted (`admission`). It
collects replies as they come, instead of every three seconds, and never waits without a limit.

A node that did not answer by the deadline counts as lost, like one whose connection is gone: it takes part again as
soon as it answers a `Hello`. So a node that hangs costs one deadline, and one that is slow is not given a second task
while it works on the first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune_strategies.admission import Admission, Members, Node, label
from fedtune_strategies.errors import FedTuneError, NodesError
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import Deferred, WrappedGrid, answer
from fedtune_strategies.protocol.records import from_record, payload_size
from fedtune_strategies.stream.grid import StreamedReply


@dataclass(frozen=True)
class NodeReply:
    """One reply, or the error that came instead."""

    node: Node  # who was asked
    message: protocol.Message | FedTuneError  # the decoded reply; an error where there is none to use
    content: RecordDict | None  # the reply as Flower carried it
    # payload of task and reply, in bytes, without Flower's envelope; of a reply that came after its deadline the task
    # was told of when the node was lost
    bytes_down: int
    bytes_up: int
    streamed: bool = False  # whether the reply came over the node's stream


def _nothing_to_supply(wanted: protocol.ModelRequest) -> protocol.Message:
    raise NodesError(f"{wanted.node} lacks the base model, and there is none to send.")


class Fleet(WrappedGrid):
    """A Grid that knows its nodes; `on_event`, `supply`, `members` and `only` are as in `Admission`."""

    def __init__(
        self,
        grid: Grid,
        fingerprint: str = "",
        poll_interval: float = 0.25,
        on_event: Callable[[str, str, str, int], None] = lambda kind, node, line, bytes_down: None,
        nodes: Iterable[Node] = (),
        supply: Callable[[protocol.ModelRequest], protocol.Message] = _nothing_to_supply,
        members: Members | None = None,
        only: Collection[str] = (),
    ) -> None:
        super().__init__(grid, poll_interval)
        self._admission = Admission(grid, fingerprint, on_event, nodes, supply, members, only)
        self._late: dict[str, tuple[Node, Message]] = {}
        self._limit = 0.0
        self._aside: set[str] = set()

    @property
    def nodes(self) -> dict[str, Node]:
        """Admitted nodes that are present and not set aside, by name in sorted order."""
        admitted = sorted(self._admission.nodes.values(), key=_name)
        return {node.name: node for node in admitted if node.name not in self._aside}

    def exclude(self, names: Iterable[str]) -> None:
        """Hide some nodes from the next tasks; an empty collection brings all back."""
        self._aside = set(names)

    def greet_early(self) -> None:
        """Greet who is there; `know_base` must follow before anything else."""
        self._admission.greet_early()

    def know_base(self, fingerprint: str, supply: Callable[[protocol.ModelRequest], protocol.Message]) -> None:
        """Say which base model nodes must have, and who sends it to those that lack it."""
        self._admission.know_base(fingerprint, supply)

    def wait_for_nodes(self, count: int, wait: float, hoped: int = 0) -> None:
        """Admit whoever is there, until `count` nodes are present, or fail after `wait` seconds.

        It waits as long for `hoped` nodes, refused ones included; with fewer it returns all the same. Where every
        refused node had the same kind of error, that kind is raised.
        """
        limit = time.monotonic() + wait
        while True:
            present = self._admission.greet()
            self._late = {key: late for key, late in self._late.items() if late[0].id in present}
            # An owner who must agree first has as long from then on.
            over = time.monotonic() > max(limit + self._admission.allowance(), self._admission.asked + wait)
            if len(self.nodes) >= count and (over or self._admission.heard >= hoped):
                return
            if over or self._admission.is_hopeless():
                raise self._admission.too_few(len(self.nodes), count, wait)
            self.wait(self._poll_interval)

    def exchange(
        self,
        tasks: Iterable[Message],
        deadline: float,
        patience: float = 0.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[list[NodeReply]]:
        """Send tasks and yield the replies as they arrive, until the deadline, in lists of what one look brought.

        There is one for every task that was answered, failed or lost; nodes still missing at the deadline are lost.
        Messages live for `patience` seconds more, in which a reply still has a use. `meanwhile` is called once the
        nodes have work.
        """
        queues: dict[int, deque[Message]] = {}
        for message in tasks:
            message.metadata.ttl = deadline + patience
            queues.setdefault(message.metadata.dst_node_id, deque()).append(message)
        pending = self._push_next(queues, queues)
        start = time.monotonic()
        self._limit = start + deadline
        meanwhile()
        while pending:
            over = time.monotonic() > self._limit
            replies = list(self._grid.pull_messages(list(pending)))
            received = []
            for reply in replies:
                task = pending.pop(reply.metadata.reply_to_message_id, None)
                if task is not None:
                    pending |= self._push_next(queues, [task.metadata.dst_node_id])
                    received.append(self._received(task, reply))
            if received:
                yield received
            if self._admission.allowance():
                self._admission.hear()
            if not replies and over:  # what arrived meanwhile counts, however long that took
                break
            if not replies:
                self.wait(self._poll_interval)
        waited = time.monotonic() - start
        for message_id, message in pending.items():
            size = payload_size(message.content)
            node = self._admission.lose(message.metadata.dst_node_id, f"did not answer within {waited:.0f} s", size)
            if node is not None:
                self._late[message_id] = (node, message)

    def late(self) -> list[NodeReply]:
        """Take what came from nodes that had missed their deadline; errors are of no interest any more."""
        found = []
        for reply in self._grid.pull_messages(list(self._late)) if self._late else ():
            node, task = self._late.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                found.append(replace(self._received(task, reply, node), bytes_down=0))
        return found

    def shorten_deadline(self, grace: float) -> None:
        """Let the exchange that is going on end after this many seconds, if its deadline is not sooner."""
        self._limit = min(self._limit, time.monotonic() + grace)

    def _push_next(self, queues: dict[int, deque[Message]], node_ids: Iterable[int]) -> dict[str, Message]:
        # One task at a time for a node: Flower does not promise to deliver several in their order.
        tasks = [queues[node_id].popleft() for node_id in node_ids if queues[node_id]]
        messages = [task.made() if isinstance(task, Deferred) else task for task in tasks]
        return dict(zip(self._grid.push_messages(messages), messages, strict=True)) if messages else {}

    def watch_named_steps(self, tell: Callable[[dict[str, tuple[int, int]]], None]) -> None:
        """As `watch_steps`, with the nodes' names."""

        def named(steps: dict[int, tuple[int, int]]) -> None:
            found = [(self._admission.nodes.get(node), far) for node, far in steps.items()]
            tell({node.name: far for node, far in found if node})

        self.watch_steps(named)

    # Flower's Grid interface

    def get_node_ids(self) -> list[int]:
        """Return the ids of `nodes`, in the order of their names."""
        return [node.id for node in self.nodes.values()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See Flower."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See Flower."""
        return self._grid.pull_messages(message_ids)

    def _received(self, task: Message, reply: Message, node: Node | None = None) -> NodeReply:
        node_id = task.metadata.dst_node_id
        node = node or self._admission.nodes.get(node_id) or Node(label(node_id), 0, 0)
        down = payload_size(task.content)
        up = 0
        try:
            up = 0 if reply.has_error() else len(from_record(reply.content)[1])
            message = answer(reply)
        except FedTuneError as error:
            return NodeReply(node, error, None, down, up)
        return NodeReply(node, message, reply.content, down, up, isinstance(reply, StreamedReply))


def _name(node: Node) -> str:
    return node.name
