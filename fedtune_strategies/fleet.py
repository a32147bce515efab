"""The nodes of a run, known by name, and the prompt way to reach them.

`Fleet` is a Flower ``Grid`` over another one. It shows strategies only the nodes that were admitted: those that
answered a `Hello`, hold the same base model and bear a name of their own. It collects replies as they come,
instead of every three seconds, and never waits without a limit.

A node that did not answer by the deadline counts as lost, like one whose connection is gone: it takes part again as
soon as it answers a `Hello`. So a node that hangs costs one deadline, and one that is slow is not given a second task
while it works on the first.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune_strategies.errors import FedTuneError, FingerprintError, NodesError, ProtocolError, error_from_code
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.records import from_record, to_record

log = logging.getLogger("fedtune")

T = TypeVar("T", bound=protocol.Message)

_REFUSED_FOR_S = 60.0
_PIECE_S = 600.0
# Loading a large model takes its time; after this the message is given up and the node greeted anew.
_HELLO_S = 1800.0


@dataclass(frozen=True)
class Node:
    """An admitted node.

    Attributes
    ----------
    name : str
        The name from its node configuration, unique in the run.
    id : int
        Flower's id of the node.
    num_examples : int
        Training examples that it holds.
    """

    name: str
    id: int
    num_examples: int


@dataclass(frozen=True)
class Received:
    """One reply, or the error that came instead.

    Attributes
    ----------
    node : Node
        Who was asked.
    message : protocol.Message or FedTuneError
        The decoded reply; an error where there is none to use.
    content : RecordDict or None
        The reply as Flower carried it.
    bytes_down, bytes_up : int
        Payload of task and reply, in bytes, without Flower's envelope.
    """

    node: Node
    message: protocol.Message | FedTuneError
    content: RecordDict | None
    bytes_down: int
    bytes_up: int


def _nothing_to_supply(wanted: protocol.ModelWanted) -> protocol.Message:
    raise NodesError(f"{wanted.node} lacks the base model, and there is none to send.")


class Fleet(Grid):
    """A Grid that knows its nodes.

    Parameters
    ----------
    grid : Grid
        Flower's grid, or an in-memory one.
    fingerprint : str
        Fingerprint of the base model; nodes with another one are not admitted.
    poll_interval : float
        Seconds between two looks for replies.
    on_event : callable
        Called with (kind, node name, line) for ``"joined"``, ``"refused"``, ``"lost"`` and
        ``"supplied"``.
    nodes : iterable of Node
        Nodes that are admitted already.
    supply : callable
        Answers a node that wants the base model.
    """

    def __init__(
        self,
        grid: Grid,
        fingerprint: str,
        poll_interval: float = 0.25,
        on_event: Callable[[str, str, str], None] = lambda kind, node, line: None,
        nodes: Iterable[Node] = (),
        supply: Callable[[protocol.ModelWanted], protocol.Message] = _nothing_to_supply,
    ) -> None:
        self._grid = grid
        self._fingerprint = fingerprint
        self._poll_interval = poll_interval
        self._on_event = on_event
        self._nodes = {node.id: node for node in nodes}
        self._hellos: dict[str, int] = {}
        self._supply = supply
        self._supplied = 0.0
        self._refused: dict[int, tuple[float, FedTuneError]] = {}
        self._claims: dict[int, Node] = {}
        self._late: dict[str, tuple[Node, Message]] = {}
        self._limit = 0.0
        self._aside: set[str] = set()

    @property
    def nodes(self) -> dict[str, Node]:
        """Admitted nodes that are present and not set aside, by name in sorted order."""
        return {node.name: node for node in sorted(self._nodes.values(), key=_name) if node.name not in self._aside}

    def set_aside(self, names: Iterable[str]) -> None:
        """Hide some nodes from the next tasks; an empty collection brings all back."""
        self._aside = set(names)

    def gather(self, count: int, wait: float) -> None:
        """Admit whoever is there, until enough nodes are present.

        Parameters
        ----------
        count : int
            Fewest nodes needed.
        wait : float
            Seconds after which to give up.

        Raises
        ------
        NodesError
            Fewer nodes came. Where every refused node had the same kind of error, that kind is raised.
        """
        limit = time.monotonic() + wait
        while True:
            self._greet()
            if len(self.nodes) >= count:
                return
            over = time.monotonic() > max(limit, self._supplied + wait)
            if over or (self._refused and not self._hellos and self._all_refused()):
                raise self._too_few(count, wait)
            time.sleep(self._poll_interval)

    def exchange(self, tasks: Iterable[Message], deadline: float, patience: float = 0.0) -> Iterator[Received]:
        """Send tasks and yield the replies as they arrive.

        Parameters
        ----------
        tasks : iterable of Message
            From `task`.
        deadline : float
            Seconds after which to stop waiting.
        patience : float
            Seconds for which a reply still has a use after that; the messages live until then.

        Yields
        ------
        Received
                One for every task that was answered, failed or lost. Nodes still missing at the deadline are lost.
        """
        queues: dict[int, deque[Message]] = {}
        for message in tasks:
            message.metadata.ttl = deadline + patience
            queues.setdefault(message.metadata.dst_node_id, deque()).append(message)
        pending = self._push_next(queues, queues)
        start = time.monotonic()
        self._limit = start + deadline
        while pending and time.monotonic() < self._limit:
            replies = list(self._grid.pull_messages(list(pending)))
            for reply in replies:
                task = pending.pop(reply.metadata.reply_to_message_id, None)
                if task is not None:
                    pending |= self._push_next(queues, [task.metadata.dst_node_id])
                    yield self._received(task, reply)
            if self._supplied:
                self._hear()
            if not replies:
                time.sleep(self._poll_interval)
        waited = time.monotonic() - start
        for message_id, message in pending.items():
            node = self._nodes.pop(message.metadata.dst_node_id, None)
            if node is not None:
                self._late[message_id] = (node, message)
                self._event("lost", node.name, f"did not answer within {waited:.0f} s")

    def late(self) -> list[Received]:
        """Take what came from nodes that had missed their deadline; errors are of no interest any more."""
        found = []
        for reply in self._grid.pull_messages(list(self._late)) if self._late else ():
            node, task = self._late.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                found.append(self._received(task, reply, node))
        return found

    def hurry(self, grace: float) -> None:
        """Let the exchange that is going on end after this many seconds, if its deadline is not sooner."""
        self._limit = min(self._limit, time.monotonic() + grace)

    def _push_next(self, queues: dict[int, deque[Message]], node_ids: Iterable[int]) -> dict[str, Message]:
        # One task at a time for a node: Flower does not promise to deliver several in their order.
        messages = [queues[node_id].popleft() for node_id in node_ids if queues[node_id]]
        return dict(zip(self._grid.push_messages(messages), messages, strict=True)) if messages else {}

    # Flower's Grid interface

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

    def get_node_ids(self) -> list[int]:
        """Return the ids of `nodes`, in the order of their names."""
        return [node.id for node in self.nodes.values()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See Flower."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See Flower."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """See Flower; replies are collected promptly."""
        pending = set(self._grid.push_messages(messages))
        limit = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while pending and time.monotonic() < limit:
            arrived = list(self._grid.pull_messages(list(pending)))
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                time.sleep(self._poll_interval)
        return replies

    # Admission

    def _greet(self) -> None:
        present = set(self._grid.get_node_ids())
        for lost in set(self._nodes) - present:
            self._event("lost", self._nodes.pop(lost).name, "is no longer connected")
        self._claims = {i: node for i, node in self._claims.items() if i in present}
        for claim in list(self._claims.values()):
            if not self._is_taken(claim.name):
                self._join(self._claims.pop(claim.id))
        self._late = {key: late for key, late in self._late.items() if late[0].id in present}
        now = time.monotonic()
        self._refused = {i: r for i, r in self._refused.items() if i in present and now - r[0] < _REFUSED_FOR_S}
        strangers = present - {*self._nodes, *self._hellos.values(), *self._refused, *self._claims}
        self._hellos = {key: node_id for key, node_id in self._hellos.items() if node_id in present}
        if strangers:
            payload = protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, self._fingerprint))
            ids = sorted(strangers)
            record = to_record(protocol.Hello.kind, payload)
            hellos = [Message(record, i, MessageType.QUERY, ttl=_HELLO_S) for i in ids]
            self._hellos |= dict(zip(self._grid.push_messages(hellos), ids, strict=True))
        self._hear()

    def _hear(self) -> None:
        """Take what greeted nodes answered."""
        if self._hellos:
            for reply in self._grid.pull_messages(list(self._hellos)):
                self._admit(self._hellos.pop(reply.metadata.reply_to_message_id), reply)

    def _admit(self, node_id: int, reply: Message) -> None:
        try:
            hello = _decoded(reply)
            if isinstance(hello, protocol.ModelWanted):
                self._send_model(node_id, hello)
                return
            if not isinstance(hello, protocol.HelloReply):
                raise ProtocolError(f"answered a hello with a '{hello.kind}'.")
            if hello.protocol != protocol.PROTOCOL_VERSION:
                raise ProtocolError(
                    f"speaks protocol {hello.protocol}, the server {protocol.PROTOCOL_VERSION}: "
                    "install the same FedTune version on both."
                )
            if hello.fingerprint != self._fingerprint:
                raise FingerprintError(
                    f"holds another base model (fingerprint {hello.fingerprint}, the server's is {self._fingerprint}): "
                    "give it the same model folder and dtype."
                )
        except FedTuneError as error:
            self._refused[node_id] = (time.monotonic(), error)
            self._event("refused", _label(node_id), str(error))
            return
        node = Node(hello.node, node_id, hello.num_examples)
        if self._is_taken(node.name):
            # It may be the same node under a new connection: it takes over when the old one is given up.
            self._claims[node_id] = node
            self._event("refused", _label(node_id), f"{_taken(node)} or wait until that one is gone.")
            return
        self._join(node)

    def _send_model(self, node_id: int, wanted: protocol.ModelWanted) -> None:
        if wanted.piece < 0:
            self._event("supplied", wanted.node, "lacks the base model: sending it")
        answer = self._supply(wanted)
        record = to_record(answer.kind, protocol.encode(answer))
        message = Message(record, node_id, MessageType.QUERY, ttl=_PIECE_S)
        self._hellos |= dict.fromkeys(self._grid.push_messages([message]), node_id)
        self._supplied = time.monotonic()

    def _join(self, node: Node) -> None:
        self._nodes[node.id] = node
        self._event("joined", node.name, f"joined with {node.num_examples} examples")

    def _is_taken(self, name: str) -> bool:
        return any(node.name == name for node in self._nodes.values())

    def _all_refused(self) -> bool:
        return not self._nodes and set(self._grid.get_node_ids()) <= set(self._refused)

    def _too_few(self, count: int, wait: float) -> FedTuneError:
        errors = [error for _, error in self._refused.values()]
        errors += [NodesError(f"{_taken(claim)}.") for claim in self._claims.values()]
        reasons = "; ".join(
            f"{_label(i)}: {error}" for i, error in zip([*self._refused, *self._claims], errors, strict=True)
        )
        kind = type(errors[0]) if errors and len({type(error) for error in errors}) == 1 else NodesError
        if reasons:
            return kind(f"{len(self.nodes)} of {count} nodes can take part. Refused: {reasons}")
        return NodesError(
            f"{len(self.nodes)} of {count} nodes joined within {wait:.0f} s: "
            "start more nodes, lower 'strategy.min-nodes' or raise 'round.node-wait'."
        )

    def _event(self, kind: str, node: str, line: str) -> None:
        log.info("%s %s", node, line, extra={"node": node})
        self._on_event(kind, node, line)

    def _received(self, task: Message, reply: Message, node: Node | None = None) -> Received:
        node = node or self._nodes.get(task.metadata.dst_node_id) or Node(_label(task.metadata.dst_node_id), 0, 0)
        down = len(from_record(task.content)[1])
        try:
            message = _decoded(reply)
        except FedTuneError as error:
            return Received(node, error, None, down, 0)
        return Received(node, message, reply.content, down, len(from_record(reply.content)[1]))


def task(node: Node, message: protocol.Message, round: int) -> Message:
    """Address a protocol message to a node.

    Parameters
    ----------
    node : Node
        The receiver.
    message : protocol.Message
        What to send.
    round : int
        Round, shown in Flower's logs.

    Returns
    -------
    flwr.app.Message
        A training message.
    """
    return address(node, message.kind, protocol.encode(message), round)


def address(node: Node, kind: str, payload: bytes, round: int) -> Message:
    """Address an encoded message to a node; encode once to send the same to many."""
    return Message(to_record(kind, payload), node.id, MessageType.TRAIN, group_id=str(round))


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


def _decoded(reply: Message) -> protocol.Message:
    if reply.has_error():
        raise NodesError(f"did not answer: {reply.error.reason or 'no reason given'} (code {reply.error.code}).")
    message = protocol.decode(*from_record(reply.content))
    if isinstance(message, protocol.Failure):
        raise error_from_code(message.exit_code, message.message)
    return message


def _label(node_id: int) -> str:
    return f"node {node_id & (2**64 - 1):016x}"


def _taken(node: Node) -> str:
    return f"has the name '{node.name}' of a node that is present: give it one of its own"


def _name(node: Node) -> str:
    return node.name
