import time

import pytest
import torch
from flwr.app import Message

from fedtune_strategies.errors import DataError, FedTuneError, FingerprintError, NodesError, TermsError
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import Deferred, task
from fedtune_strategies.testing import InMemoryGrid


def greeter(name, fingerprint="base", version=protocol.PROTOCOL_VERSION):
    """Make a node that answers a hello, and any task with an acknowledgement."""

    def handle(kind, payload):
        reply = (
            protocol.HelloReply(name, version, 5, fingerprint, 1)
            if kind == "hello"
            else protocol.Ack(name, protocol.decode(kind, payload).round)
        )
        return reply.kind, protocol.encode(reply)

    return handle


def failing(exit_code, line):
    failure = protocol.Failure(exit_code, line)
    return lambda kind, payload: (failure.kind, protocol.encode(failure))


def make(nodes, events=None):
    note = (lambda *event: events.append(event)) if events is not None else (lambda *event: None)
    return Fleet(InMemoryGrid(nodes), "base", poll_interval=0.01, on_event=note)


def kept(node, round=1):
    return task(node.id, protocol.Ack(node.name, round), round)


def flat(batches):
    return [received for batch in batches for received in batch]


def test_admitted_nodes_come_by_name_in_sorted_order():
    fleet = make({1: greeter("b"), 2: greeter("a"), 3: greeter("c")})
    fleet.wait_for_nodes(3, wait=1)
    assert list(fleet.nodes) == ["a", "b", "c"] and fleet.get_node_ids() == [2, 1, 3]


def test_who_was_greeted_before_the_base_model_was_known_is_judged_by_it():
    """One holds it, one another one, and one none until it is told which."""
    greeted, told = [], {}

    def lacking(kind, payload):
        if (hello := protocol.decode(kind, payload)).fingerprint:
            told["it"] = hello.fingerprint
        return greeter("lacking", told.get("it", ""))(kind, payload)

    def noted(handler):
        return lambda kind, payload: (greeted.append(kind), handler(kind, payload))[1]

    nodes = {1: greeter("has"), 2: lacking, 3: greeter("other", "another")}
    fleet = Fleet(InMemoryGrid({i: noted(handler) for i, handler in nodes.items()}), poll_interval=0.01)
    fleet.greet_early()
    assert len(greeted) == 3 and not fleet.nodes
    fleet.know_base("base", lambda wanted: protocol.Ack("", 0))
    fleet.wait_for_nodes(2, wait=5, hoped=3)
    assert list(fleet.nodes) == ["has", "lacking"]
    assert len(greeted) == 5  # who holds it is not greeted twice


def test_joining_and_leaving_are_events():
    events, nodes = [], {1: greeter("a"), 2: greeter("b")}
    fleet = make(nodes, events)
    fleet.wait_for_nodes(2, wait=1)
    del nodes[1]
    nodes[3] = greeter("a")
    fleet.wait_for_nodes(2, wait=1)
    assert [event[:2] for event in events] == [("joined", "a"), ("joined", "b"), ("lost", "a"), ("joined", "a")]
    assert fleet.nodes["a"].id == 3


def test_an_owner_who_must_agree_first_is_waited_for_and_told_of_once(monkeypatch):
    monkeypatch.setattr("fedtune_strategies.admission._ASKING_FOR_S", 0.02)
    events, asked = [], []
    waits, agrees = failing(TermsError.exit_code, "its owner must agree first"), greeter("a")

    def agreeing_at_the_third_hello(kind, payload):
        asked.append(kind)
        return (agrees if len(asked) > 2 else waits)(kind, payload)

    fleet = make({1: agreeing_at_the_third_hello}, events)
    fleet.wait_for_nodes(1, wait=5)
    assert [event[0] for event in events] == ["refused", "joined"] and len(asked) == 3
    with pytest.raises(TermsError, match="0 of 1 node can take part"):
        make({1: waits}).wait_for_nodes(1, wait=0.1)


@pytest.mark.parametrize(
    ("handler", "error", "words"),
    [
        (greeter("x", fingerprint="other"), FingerprintError, "another base model"),
        (greeter("x", version=99), FedTuneError, "protocol 99"),
        (failing(11, "data.jsonl, line 3: broken"), DataError, "line 3"),
        (lambda kind, payload: ("kept", protocol.encode(protocol.Ack("x", 1))), FedTuneError, "kept"),
        (lambda kind, payload: ("nonsense", b""), FedTuneError, "nonsense"),
    ],
)
def test_a_node_that_may_not_take_part_is_named_with_the_reason(handler, error, words):
    events = []
    fleet = make({1: handler}, events)
    with pytest.raises(error, match=words):
        fleet.wait_for_nodes(1, wait=5)
    assert events[0][0] == "refused" and words in events[0][2]


def test_refused_nodes_do_not_keep_the_others_out():
    fleet = make({1: failing(11, "no data"), 2: greeter("b")})
    fleet.wait_for_nodes(1, wait=1)
    assert list(fleet.nodes) == ["b"]


def test_waiting_for_nodes_has_an_end():
    start = time.monotonic()
    with pytest.raises(NodesError, match="1 of 2 nodes"):
        make({1: greeter("a")}).wait_for_nodes(2, wait=0.2)
    assert time.monotonic() - start < 2


def test_the_first_round_waits_for_all_who_are_there_but_not_for_the_refused():
    class Arriving(InMemoryGrid):
        looks = 0

        def get_node_ids(self):
            self.looks += 1
            return [1, 2, 3][: self.looks]

    nodes = {1: greeter("a"), 2: failing(13, "no memory left"), 3: greeter("c")}
    fleet = Fleet(Arriving(nodes), "base", poll_interval=0.001)
    fleet.wait_for_nodes(1, 60.0, hoped=3)
    assert [*fleet.nodes] == ["a", "c"]
    fleet.wait_for_nodes(1, 0.01, hoped=5)
    with pytest.raises(FedTuneError):
        fleet.wait_for_nodes(3, 0.01, hoped=5)


class SlowGrid(InMemoryGrid):
    """Holds the replies of some nodes back."""

    def __init__(self, nodes, slow):
        super().__init__(nodes)
        self.slow = slow
        self.most_waiting = 0
        self.waiting = {}

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            waiting = self.waiting.setdefault(message.metadata.dst_node_id, 0) + 1
            self.waiting[message.metadata.dst_node_id] = waiting
            self.most_waiting = max(self.most_waiting, waiting)
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            self.waiting[reply.metadata.src_node_id] -= 1
        return [reply for reply in replies if reply.metadata.src_node_id not in self.slow]


def test_an_exchange_ends_at_its_deadline_without_the_slow():
    grid = SlowGrid({1: greeter("a"), 2: greeter("b")}, slow=set())
    fleet = Fleet(grid, "base", poll_interval=0.01)
    fleet.wait_for_nodes(2, wait=1)
    grid.slow = {2}
    start = time.monotonic()
    received = flat(fleet.exchange([kept(node) for node in fleet.nodes.values()], deadline=0.3))
    assert [one.node.name for one in received] == ["a"]
    assert 0.2 < time.monotonic() - start < 2


def test_tasks_carry_their_deadline():
    grid = InMemoryGrid({1: greeter("a")})
    fleet = Fleet(grid, "base", poll_interval=0.01)
    fleet.wait_for_nodes(1, wait=1)
    message = kept(fleet.nodes["a"])
    list(fleet.exchange([message], deadline=12.5))
    assert message.metadata.ttl == 12.5


def test_a_task_that_is_made_when_its_turn_comes_is_sent_as_flower_s_own_message():
    sent = []

    class Grid(InMemoryGrid):
        def push_messages(self, messages):
            sent.extend(messages := list(messages))
            return super().push_messages(messages)

    fleet = Fleet(Grid({1: greeter("a")}), "base", poll_interval=0.01)
    fleet.wait_for_nodes(1, wait=1)
    sent.clear()
    late = Deferred(fleet.nodes["a"].id, protocol.Ack.kind, lambda: protocol.Ack("a", 3), 3)
    ((received,),) = fleet.exchange([late], deadline=12.5)
    # Flower writes the class of a message into it, and no SuperLink takes another than its own.
    assert type(sent[0]) is Message and sent[0].metadata.ttl == 12.5 and sent[0].metadata.group_id == "3"
    assert received.message.round == 3


def test_a_node_gets_one_task_at_a_time_in_order():
    seen = []

    def handle(kind, payload):
        if kind != "hello":
            seen.append(protocol.decode(kind, payload).round)
        return greeter("a")(kind, payload)

    grid = SlowGrid({1: handle}, slow=set())
    fleet = Fleet(grid, "base", poll_interval=0.01)
    fleet.wait_for_nodes(1, wait=1)
    node = fleet.nodes["a"]
    received = flat(fleet.exchange([kept(node, number) for number in range(5)], deadline=5))
    assert seen == [0, 1, 2, 3, 4] and len(received) == 5
    assert grid.most_waiting == 1


def test_an_error_instead_of_a_reply_is_received_as_one():
    fleet = make({1: greeter("a")})
    fleet.wait_for_nodes(1, wait=1)
    fleet._grid.nodes = {1: lambda kind, payload: 1 / 0}
    (received,) = flat(fleet.exchange([kept(fleet.nodes["a"])], deadline=1))
    assert isinstance(received.message, NodesError) and "division by zero" in str(received.message)


def test_nodes_set_aside_are_hidden_until_called_back():
    fleet = make({1: greeter("a"), 2: greeter("b")})
    fleet.wait_for_nodes(2, wait=1)
    fleet.exclude({"a"})
    assert list(fleet.nodes) == ["b"]
    fleet.exclude(())
    assert list(fleet.nodes) == ["a", "b"]


def listed(nodes, names, events=None, only=(), grid=InMemoryGrid):
    note = (lambda *event: events.append(event)) if events is not None else (lambda *event: None)
    return Fleet(grid(nodes), "base", poll_interval=0.01, on_event=note, members=lambda: names, only=only)


def test_a_member_that_calls_itself_by_another_s_name_takes_neither_name_nor_place():
    """Alice is absent; mallory, with a key of her own, answers the hello as alice."""
    events, names = [], {1: "alice", 2: "mallory", 3: "carol"}
    nodes = {2: greeter("alice"), 3: greeter("carol")}
    fleet = listed(nodes, names, events)
    fleet.wait_for_nodes(1, wait=1)
    assert list(fleet.nodes) == ["carol"]
    (refusal,) = [line for kind, _, line, _ in events if kind == "refused"]
    assert "calls itself 'alice', but its key is that of 'mallory'" in refusal
    nodes[1] = greeter("alice")
    fleet.wait_for_nodes(2, wait=1)
    assert fleet.nodes["alice"].id == 1


def test_who_is_on_no_list_or_not_named_is_not_even_asked():
    asked, names = [], {2**64 - 1: "alice", 2: "bob"}

    def spy(number, name):
        answer = greeter(name)
        return lambda kind, payload: asked.append(number) or answer(kind, payload)

    fleet = listed({-1: spy(-1, "alice"), 2: spy(2, "bob"), 7: spy(7, "carol")}, names, only=["alice"])
    fleet.wait_for_nodes(1, wait=1)
    assert list(fleet.nodes) == ["alice"] and asked == [-1]
    names.clear()  # revoked
    with pytest.raises(NodesError):
        fleet.wait_for_nodes(1, wait=0.05)
    assert not fleet.nodes


def test_a_node_that_asks_for_the_model_for_ever_is_not_waited_for():
    """Each part counts once, and no more than a slow link would take; the eighth question for one is refused."""
    asked = []

    def greedy(kind, payload):
        asked.append(kind)
        wanted = protocol.ModelRequest("alice", 0)
        return wanted.kind, protocol.encode(wanted)

    chunk = torch.zeros(1 << 12, dtype=torch.uint8)
    fleet = Fleet(
        InMemoryGrid({1: greedy}), "base", poll_interval=0.001, supply=lambda wanted: protocol.ModelChunk(0, chunk)
    )
    start = time.monotonic()
    with pytest.raises(FedTuneError, match="asked 8 times"):
        fleet.wait_for_nodes(1, wait=0.1)
    assert time.monotonic() - start < 20 and asked.count("model-chunk") == 8
