"""What comes from outside, as a hostile member would send it: cleaned or refused before it is kept or printed."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.errors import NodesError, ProtocolError
from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.door import check_name, clean, refusing
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import make_nodes
from tests.protocol.test_messages import EXAMPLES

REPLY = next(one for one in EXAMPLES if isinstance(one, SeedReply))


def sent(message):
    return protocol.decode(message.kind, protocol.encode(message))


@given(st.text() | st.text(st.characters(), max_size=700))
def test_cleaned_text_is_one_short_printable_line_and_stays_so(text):
    line = clean(text)
    assert len(line) <= 300 and line.isprintable()
    line.encode()
    assert clean(line) == line


def test_plain_text_is_left_as_it_is():
    assert clean("data.jsonl, Zeile 3: größer als 2 µs") == "data.jsonl, Zeile 3: größer als 2 µs"
    assert clean("a\x1b[2K\rb\u202ec\ud800\nd") == "a [2K b c? d"
    assert clean("x" * 5_000_000) == "x" * 299 + "…"


@pytest.mark.parametrize("name", ["a", "node-0", "0_a.B-c", "n" * 64])
def test_ordinary_names_pass(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-rf", "a/b", "../../PLANTED/ok", "a b", "a\nExecStartPre=/bin/sh", "ä", "\ud800", "[/x]"]
)
def test_names_that_could_be_paths_options_or_lines_are_refused(name):
    with pytest.raises(ProtocolError, match="1 to 64 letters") as caught:
        check_name(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    with pytest.raises(ProtocolError, match="1 to 64 letters"):
        sent(protocol.Ack(name, 1))


def test_a_name_of_three_megabytes_is_refused_in_a_short_line():
    with pytest.raises(ProtocolError) as caught:
        sent(protocol.Ack("n" * 3_000_000, 1))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"num_examples": 0},
        {"num_examples": 10**9 + 1},
        {"num_examples": 2**63},
        {"num_examples": 10**400},
        {"peak_memory": -1},
        {"peak_memory": 10**400},
        {"seconds": math.inf},
        {"seconds": math.nan},
        {"seconds": -1.0},
        {"loss": math.inf},
        {"loss": 1e308},
        {"round": 2**63},
    ],
    ids=lambda change: "=".join(f"{name}={str(value)[:9]}" for name, value in change.items()),
)
def test_numbers_out_of_range_are_refused_by_name(change):
    with pytest.raises(ProtocolError, match=next(iter(change))):
        sent(replace(REPLY, **change))


@pytest.mark.parametrize(
    "change",
    [{"num_examples": 1}, {"num_examples": 10**9}, {"loss": math.nan}, {"loss": -3.0}, {"peak_memory": 2**50}],
)
def test_numbers_in_range_pass(change):
    ((name, value),) = change.items()
    again = getattr(sent(replace(REPLY, **change)), name)
    assert again == value or (math.isnan(value) and math.isnan(again))


def test_a_failure_of_five_megabytes_becomes_a_line():
    got = sent(protocol.Failure(11, "\x1b[2J" + "x" * 5_000_000))
    assert len(got.message) <= 300 and got.message.isprintable()


def test_tensors_with_names_that_are_no_lines_are_refused():
    (block,) = (one for one in EXAMPLES if one.kind == "block-reply")
    for name in ("a\nb", "x" * 10**6, "\x1b[2K"):
        with pytest.raises(ProtocolError, match="no short lines"):
            sent(replace(block, delta={name: block.delta["a"]}))


def test_whatever_a_reply_raises_is_a_refusal_but_an_order_to_stop_is_not():
    for error in (ZeroDivisionError("x"), MemoryError(), RecursionError(), UnicodeEncodeError("u", "", 0, 1, "x")):
        with pytest.raises(ProtocolError, match=type(error).__name__), refusing():
            raise error
    with pytest.raises(NodesError, match="as it came"), refusing():
        raise NodesError("as it came")
    with pytest.raises(KeyboardInterrupt), refusing():
        raise KeyboardInterrupt


def raw(kind, fields, data=b""):
    """What `encode` would not make: any header, with lone surrogates too."""
    header = json.dumps(fields).encode()
    return kind, len(header).to_bytes(4, "little") + header + data


def hostile(node, answer):
    """Make a member that joins as it should and then answers every task with something of its own."""
    return lambda kind, payload: node.handle(kind, payload) if kind == "hello" else answer()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: raw("ack", ["\ud800", 1]), "1 to 64 letters"),
        (lambda: raw("ack", ["n" * 3_000_000, 1]), "1 to 64 letters"),
        (lambda: raw("failure", [11, "[/x]\x1b[2K\ud800" + "y" * 5_000_000]), "[/x] [2K?yyy"),
        (lambda: raw("ack", ["node-0", 10**400]), "round is not within"),
        (lambda: ("\x1b[2K" * 10**6, b""), "unknown kind"),
        (lambda: raw("ack", {}), "damaged"),
        (lambda: ("ack", os.urandom(64)), "damaged"),
    ],
)
def test_a_member_that_answers_with_an_attack_is_refused_in_one_line_and_the_run_ends_well(
    settings, data_files, answer, reason
):
    settings |= {"num-server-rounds": 2, "strategy.min-nodes": 2}
    nodes = make_nodes(settings, data_files)
    execute(InMemoryGrid({1: hostile(nodes[1], answer), 2: nodes[2].handle, 3: nodes[3].handle}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    refused = [record for record in ledger.records("refused") if record.round]
    assert ledger.last("round").round == 2 and {record.node for record in refused} == {"node-0"}
    for record in refused:
        said = record.body["reason"]
        assert reason in said and said.isprintable() and len(said) < 400


def test_an_exception_in_accepting_is_the_nodes_refusal(settings, data_files, monkeypatch):
    settings |= {"num-server-rounds": 1, "strategy.min-nodes": 2}
    honest = FedKSeed.accept

    def accept(self, round, reply):
        if reply.node == "node-0":
            raise OverflowError("int too large")
        return honest(self, round, reply)

    monkeypatch.setattr(FedKSeed, "accept", accept)
    nodes = make_nodes(settings, data_files)
    execute(InMemoryGrid({number: node.handle for number, node in nodes.items()}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    refused = [record for record in ledger.records("refused") if record.round]
    assert [record.node for record in refused] == ["node-0"] and "OverflowError" in refused[0].body["reason"]
    assert {record.node for record in ledger.records("reply")} == {"node-1", "node-2"}


def test_a_stranger_that_greets_with_an_attack_keeps_nobody_out():
    def greet(name):
        reply = protocol.HelloReply(name, protocol.PROTOCOL_VERSION, 5, "base", 1)
        return lambda kind, payload: (reply.kind, protocol.encode(reply))

    seen = []
    grid = InMemoryGrid({1: greet("a\x1b[2K"), 2: greet("b"), 3: lambda kind, payload: raw("hello-reply", ["\ud800"])})
    fleet = Fleet(grid, "base", poll_interval=0.01, on_event=lambda *event: seen.append(event))
    fleet.wait_for_nodes(1, wait=5)
    assert list(fleet.nodes) == ["b"]
    assert [kind for kind, *_ in seen] == ["refused", "joined", "refused"]
    assert all(line.isprintable() for _, _, line, _ in seen)
