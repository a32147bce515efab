"""Who takes part in a run: those that answered a `Hello`, hold its base model and bear a name of their own.

A node's name follows from its key, by the operator's list of members. Without such a list a node is called what it
calls itself, and one that comes back under another id of Flower waits until its old connection is given up, and then
takes over its name. A node that lacks the base model is sent it first. A refused node is asked again after a minute,
sooner where its owner must agree first.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune_strategies.errors import FedTuneError, FingerprintError, NodesError, ProtocolError, TermsError
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.door import refusing
from fedtune_strategies.protocol.flower import answer, query
from fedtune_strategies.protocol.records import payload_size
from fedtune_strategies.words import counted

log = logging.getLogger("fedtune")

_REFUSED_FOR_S = 60.0
# A node's owner who is asked may agree at any moment.
_ASKING_FOR_S = 5.0
_CHUNK_S = 600.0
# So many parts of the base model are on their way at once, and in memory, to however many nodes.
_PARTS_AT_ONCE = 32
# So often a node may ask for the same part of the base model, on a bad link too; after that it is refused.
_ASKS = 8
# Loading a large model takes its time; after this the message is given up and the node greeted again.
_HELLO_S = 1800.0
# Slower than this a node's download of the base model is not waited for.
_LEAST_BYTES_A_SECOND = 1 << 16

Members = Callable[[], Mapping[int, str]]
"""Gives the operator's list: the name of each member by its id of Flower, which follows from its key."""


@dataclass(frozen=True)
class Node:
    """An admitted node."""

    name: str  # the name from its node configuration, unique in the run
    id: int  # Flower's id of the node
    num_examples: int  # training examples that it holds


class Admission:
    """The nodes that are admitted, and the greeting of others.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    fingerprint : str
        Fingerprint of the base model; nodes with another one are not admitted.
    on_event : callable
        Called with (kind, node name, line, bytes) for ``"joined"``, ``"refused"``, ``"lost"`` and ``"supplied"``; the
        bytes are those that went down to the node and that no answer will account for.
    nodes : iterable of Node
        Nodes that are admitted already.
    supply : callable
        Answers a node that wants the base model.
    members : callable, optional
        Gives the operator's list; None where there is none, and nodes name themselves.
    only : collection of str
        Names of those that may take part; empty for all.

    Attributes
    ----------
    nodes : dict of int to Node
        The admitted nodes by id.
    asked : float
        When it turned out last that a node's owner must agree first, by the monotonic clock; 0 for never.
    """

    def __init__(
        self,
        grid: Grid,
        fingerprint: str,
        on_event: Callable[[str, str, str, int], None],
        nodes: Iterable[Node],
        supply: Callable[[protocol.ModelRequest], protocol.Message],
        members: Members | None = None,
        only: Collection[str] = (),
    ) -> None:
        self.nodes = {node.id: node for node in nodes}
        self._taken = {node.name for node in self.nodes.values()}
        self._listed: Mapping[int, str] | None = None  # the operator's list, read once for each look
        self._members, self._only = members, frozenset(only)
        self.asked = 0.0
        self._grid = grid
        self._fingerprint = fingerprint
        self._on_event = on_event
        self._supply = supply
        self._hellos: dict[str, int] = {}
        self._early: set[str] = set()
        self._asks: Counter[tuple[int, int]] = Counter()
        self._supplied: Counter[int] = Counter()
        self._parts: dict[str, float] = {}  # of the base model, on their way, and since when
        self._waiting: deque[tuple[int, Message]] = deque()  # answers of nodes that want one, as soon as there is room
        self._untold: Counter[int] = Counter()  # bytes of the base model that no event has told of
        self._refused: dict[int, tuple[float, FedTuneError]] = {}
        self._asking: dict[int, str] = {}
        self._claims: dict[int, Node] = {}

    def greet_early(self) -> None:
        """Greet who is there before the server knows its own model, so that nodes load theirs meanwhile."""
        self._early |= self._greet(self._present(), "")

    def know_base(self, fingerprint: str, supply: Callable[[protocol.ModelRequest], protocol.Message]) -> None:
        """Take note of the base model, before any answer is looked at."""
        self._fingerprint, self._supply = fingerprint, supply

    def greet(self) -> set[int]:
        """Give up nodes that are gone, greet strangers, take what was answered; returns the ids of all connected."""
        present = self._present()
        for lost in set(self.nodes) - present:
            self.lose(lost, "is no longer connected, or no longer a member")
        for gone in self._untold.keys() - present:
            self._event("lost", label(gone), "went while it was sent the base model", self._untold.pop(gone))
        self._claims = {i: node for i, node in self._claims.items() if i in present}
        for claim in list(self._claims.values()):
            if claim.name not in self._taken:
                self._join(self._claims.pop(claim.id))
        now = time.monotonic()
        self._refused = {i: r for i, r in self._refused.items() if i in present and now - r[0] < _patience(r[1])}
        self._waiting = deque((i, reply) for i, reply in self._waiting if i in present)
        waiting = {i for i, _ in self._waiting}
        strangers = present - {*self.nodes, *self._hellos.values(), *self._refused, *self._claims, *waiting}
        self._hellos = {key: node_id for key, node_id in self._hellos.items() if node_id in present}
        self._greet(strangers, self._fingerprint)
        self.hear()
        return present

    def _greet(self, strangers: Collection[int], fingerprint: str) -> set[str]:
        """Send hellos; returns their ids."""
        if not strangers:
            return set()
        ids = sorted(strangers)
        hello = protocol.Hello(protocol.PROTOCOL_VERSION, fingerprint)
        sent = dict(zip(self._grid.push_messages([query(i, hello, _HELLO_S) for i in ids]), ids, strict=True))
        self._hellos |= sent
        return set(sent)

    def hear(self) -> None:
        """Take what greeted nodes answered."""
        if self._hellos:
            self._listed = self._names()
        while self._hellos and (replies := list(self._grid.pull_messages(list(self._hellos)))):
            for reply in replies:
                key = reply.metadata.reply_to_message_id
                self._admit(self._hellos.pop(key), reply, early=key in self._early)
        while self._waiting and self._has_room():
            self._admit(*self._waiting.popleft())

    def lose(self, node_id: int, line: str, unanswered: int = 0) -> Node | None:
        """Give up a node, with so many bytes of a task; returns it, or None where it is given up already."""
        node = self.nodes.pop(node_id, None)
        if node is not None:
            self._taken.discard(node.name)
            self._event("lost", node.name, line, unanswered)
        return node

    def allowance(self) -> float:
        """Seconds for which the transfer of the base model may hold the run up, at most: each part counts once."""
        return max(self._supplied.values(), default=0) / _LEAST_BYTES_A_SECOND

    @property
    def heard(self) -> int:
        """Number of connected nodes that have introduced themselves, whether or not they were admitted."""
        return len(self.nodes) + len(self._refused) + len(self._claims)

    def is_hopeless(self) -> bool:
        """Say whether all that are connected were refused for good, and nobody is being asked."""
        asking = any(isinstance(error, TermsError) for _, error in self._refused.values())
        refused = bool(self._refused) and not asking and not self._hellos and not self.nodes
        return refused and self._present() <= set(self._refused)

    def too_few(self, found: int, count: int, wait: float) -> FedTuneError:
        """Say that only so many nodes came, and why others were refused.

        Where every refused node had the same kind of error, it is an error of that kind, otherwise `NodesError`.
        """
        errors = [error for _, error in self._refused.values()]
        errors += [NodesError(f"{_taken(claim)}.") for claim in self._claims.values()]
        reasons = "; ".join(
            f"{label(i)}: {error}" for i, error in zip([*self._refused, *self._claims], errors, strict=True)
        )
        kind = type(errors[0]) if errors and len({type(error) for error in errors}) == 1 else NodesError
        if reasons:
            return kind(f"{found} of {counted(count, 'node')} can take part. Refused: {reasons}")
        return NodesError(
            f"{found} of {counted(count, 'node')} joined within {wait:.0f} s: "
            "start more nodes, lower 'strategy.min-nodes' or raise 'round.node-wait'."
        )

    def _admit(self, node_id: int, reply: Message, *, early: bool = False) -> None:
        try:
            hello = answer(reply)
            if isinstance(hello, protocol.ModelRequest):
                if self._has_room():
                    self._send_model(node_id, hello)
                else:
                    self._waiting.append((node_id, reply))
                return
            if not isinstance(hello, protocol.HelloReply):
                raise ProtocolError(f"answered a hello with a '{hello.kind}'.")
            if hello.protocol != protocol.PROTOCOL_VERSION:
                raise ProtocolError(
                    f"speaks protocol {hello.protocol}, the server {protocol.PROTOCOL_VERSION}: "
                    "install the same FedTune version on both."
                )
            if early and hello.fingerprint != self._fingerprint:
                self._greet({node_id}, self._fingerprint)  # it did not know which model: now it does
                return
            if hello.fingerprint != self._fingerprint:
                raise FingerprintError(
                    f"holds another base model (fingerprint {hello.fingerprint}, the server's is {self._fingerprint}): "
                    "give it the same model folder and dtype."
                )
            name = self._name(node_id, hello.node)
        except FedTuneError as error:
            self._refused[node_id] = (time.monotonic(), error)
            if not isinstance(error, TermsError):
                self._event("refused", label(node_id), str(error))
            elif self._asking.get(node_id) != str(error):  # told of once while its owner thinks it over
                self.asked = self.asked if node_id in self._asking else time.monotonic()
                self._asking[node_id] = str(error)
                known = (self._listed or {}).get(_unsigned(node_id), "")
                self._event("refused", known, str(error) if known else f"{label(node_id)}: {error}")
            return
        node = Node(name, node_id, hello.num_examples)
        if node.name in self._taken:
            # It may be the same node under a new connection: it takes over when the old one is given up.
            self._claims[node_id] = node
            self._event("refused", label(node_id), f"{_taken(node)} or wait until that one is gone.")
            return
        self._join(node)

    def _present(self) -> set[int]:
        """Ids of the connected nodes; who is not on the list, or not wanted in this run, is not even asked."""
        connected, names = set(self._grid.get_node_ids()), self._names()
        if names is None:
            return connected
        return {i for i in connected if (name := names.get(_unsigned(i))) and (not self._only or name in self._only)}

    def _names(self) -> Mapping[int, str] | None:
        return self._members() if self._members else None

    def _name(self, node_id: int, claimed: str) -> str:
        """The name of a node: the list knows it by its key. What the node says must be the same."""
        names = self._listed
        known = claimed if names is None else names.get(_unsigned(node_id))
        if known is None:
            raise ProtocolError("is not on the operator's list of members.")
        if known != claimed:
            raise ProtocolError(f"calls itself '{claimed}', but its key is that of '{known}'.")
        if self._only and known not in self._only:
            raise NodesError(f"'{known}' is not among 'strategy.nodes'.")
        return known

    def _send_model(self, node_id: int, wanted: protocol.ModelRequest) -> None:
        name, part = self._name(node_id, wanted.node), (node_id, max(wanted.chunk, -1))
        if self._asks[part] == _ASKS:
            raise ProtocolError(
                f"asked {_ASKS} times for the same part of the base model: give it the model by its 'model' key."
            )
        if wanted.chunk < 0:
            self._event("supplied", name, "lacks the base model: sending it")
        with refusing():
            message = query(node_id, self._supply(wanted), _CHUNK_S)
        size = payload_size(message.content)
        self._untold[node_id] += size
        if not self._asks[part]:
            self._supplied[node_id] += size
        self._asks[part] += 1
        for key in self._grid.push_messages([message]):
            self._hellos[key], self._parts[key] = node_id, time.monotonic()

    def _has_room(self) -> bool:
        """Say whether another part of the base model may be sent; one that was given up is on its way no more."""
        since = time.monotonic() - _CHUNK_S
        self._parts = {key: sent for key, sent in self._parts.items() if key in self._hellos and sent > since}
        return len(self._parts) < _PARTS_AT_ONCE

    def _join(self, node: Node) -> None:
        self.nodes[node.id] = node
        self._taken.add(node.name)
        line = f"joined with {counted(node.num_examples, 'example')}"
        self._event("joined", node.name, line, self._untold.pop(node.id, 0))

    def _event(self, kind: str, node: str, line: str, bytes_down: int = 0) -> None:
        log.info("%s %s", node, line, extra={"node": node})
        self._on_event(kind, node, line, bytes_down)


def _patience(error: FedTuneError) -> float:
    return _ASKING_FOR_S if isinstance(error, TermsError) else _REFUSED_FOR_S


def label(node_id: int) -> str:
    """Name a node whose own name is not known."""
    return f"node {_unsigned(node_id):016x}"


def _unsigned(node_id: int) -> int:
    """Flower writes ids with a sign in some places, and without in others."""
    return node_id & (2**64 - 1)


def _taken(node: Node) -> str:
    return f"has the name '{node.name}' of a node that is present: give it another"
