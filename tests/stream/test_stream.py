"""Tasks and replies over streams, and what becomes of them when one breaks, falls silent or is a stranger's."""

import os

import grpc
import pytest

from client_app.stream import Stream
from deploy.common.processes import free_port
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.protocol.records import from_record
from fedtune_strategies.stream.frames import METHOD, SECRET, SERVICE, Beat, Part, Received, decode, encode
from fedtune_strategies.stream.loop import call
from fedtune_strategies.stream.offer import Offer, decode_offer
from fedtune_strategies.stream.server import StreamServer
from tests.stream.conftest import Streams, wait_until


def test_a_node_is_greeted_by_flower_and_then_works_over_its_stream(streams):
    kind, payload, streamed = streams.ask(1, b"first")
    assert (kind, payload, streamed) == ("task-of-1", b"first", False)
    wait_until(lambda: streams.server.works(1))
    assert streams.ask(1, b"second") == ("task-of-1", b"second", True)
    # One that cannot reach it takes part beside it, as before.
    for _ in range(2):
        assert streams.ask(3) == ("task-of-3", b"x", False)
    assert streams.ask(1, b"third") == ("task-of-1", b"third", True)
    assert streams.ask(1, b"") == ("task-of-1", b"", True)


def test_replies_of_both_ways_are_collected_together(streams):
    streams.connect(1, 2)
    keys = [streams.push(node, payload) for node in (1, 2, 3) for payload in (b"a", b"b")]
    replies = streams.pull(*keys)
    expected = [(f"task-of-{node}", payload) for node in (1, 2, 3) for payload in (b"a", b"b")]
    assert [from_record(reply.content) for reply in replies] == expected
    assert not streams.grid._sent and not streams.grid._replies and not streams.grid._again


def test_signs_of_life_say_how_far_a_task_is_until_it_is_answered(streams, quick):
    told = []
    streams.grid.watch_steps(told.append)
    streams.connect(1, 2)
    for node in (1, 2):
        streams.nodes[node].free.clear()
    streams.nodes[1].step = (57, 200)  # node 2's method does not say
    keys = [streams.push(node) for node in (1, 2, 3)]
    wait_until(lambda: told[-1:] == [{1: (57, 200)}])
    streams.nodes[1].step = (58, 200)
    wait_until(lambda: told[-1:] == [{1: (58, 200)}])
    for node in (1, 2):
        streams.nodes[node].free.set()
    streams.pull(*keys)
    wait_until(lambda: told[-1:] == [{}])


@pytest.mark.parametrize("step", [(2, 1), (1, 0)])
def test_a_step_beyond_the_last_one_ends_the_stream(step):
    with pytest.raises(ProtocolError, match="beyond the last"):
        decode(encode(Beat(*step)))
    assert decode(encode(Beat(1, 2))) == Beat(1, 2)


def test_a_broken_connection_is_made_again_and_a_task_done_once(streams):
    streams.connect(1)
    streams.nodes[1].free.clear()
    key = streams.push(1, b"work")
    wait_until(lambda: b"work" in streams.nodes[1].tasks)
    streams.wire.cut()
    streams.nodes[1].free.set()
    (reply,) = streams.pull(key)
    assert from_record(reply.content) == ("task-of-1", b"work")
    assert streams.nodes[1].tasks.count(b"work") == 1 and streams.flower.count == 1


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_large_message_goes_on_in_its_middle(streams, share):
    """Cut on the way down or on the way back up, nothing that had arrived is sent again but what was in the pipes."""
    streams.connect(1)
    payload = os.urandom(24 * 2**20)
    before = streams.wire.carried
    streams.wire.cut_after = before + int(2 * len(payload) * share)
    assert streams.ask(1, payload) == ("task-of-1", payload, True)
    assert streams.wire.cut_after is None, "the connection was not cut"
    assert streams.wire.carried - before < 2.6 * len(payload)


def test_a_reply_as_large_as_the_model_allows_comes_and_a_larger_one_ends_the_stream(streams):
    streams.connect(1, 2)
    streams.server.most_bytes = 4
    assert streams.pull(streams.push(1, b"12345"))[0].has_error()
    streams.grid.allow_replies(5)
    assert streams.ask(2, b"12345") == ("task-of-2", b"12345", True)


@pytest.mark.parametrize(
    "frame", [Part(1, 2, 2**40, 2**39, b"d" * 16, "kind", memoryview(b"x")), Received(2**31, 2**40)]
)
def test_frames_count_the_bytes_of_messages_above_4_gb(frame):
    assert decode(encode(frame)) == frame


def test_a_stream_that_stays_broken_is_replaced_by_flower(streams, quick):
    streams.connect(1)
    streams.nodes[1].free.clear()
    key = streams.push(1, b"work")
    wait_until(lambda: b"work" in streams.nodes[1].tasks)
    streams.wire.open = False
    streams.wire.cut()
    streams.nodes[1].free.set()
    (reply,) = streams.pull(key)
    assert from_record(reply.content) == ("task-of-1", b"work") and streams.flower.count == 2
    # Once it can be reached again, it is.
    streams.wire.open = True
    streams.ask(1)
    wait_until(lambda: streams.server.works(1))
    assert streams.ask(1)[2]


def test_a_silent_node_is_lost_and_comes_back_by_flower(streams, quick):
    streams.connect(1, 2)
    streams.wire.flows.clear()
    key = streams.push(1)
    (reply,) = streams.pull(key)
    assert reply.has_error() and "no sign of life" in reply.error.reason
    assert 1 not in streams.grid.get_node_ids() and 3 in streams.grid.get_node_ids()
    streams.wire.flows.set()
    wait_until(lambda: streams.grid.get_node_ids() == [1, 2, 3])
    assert not streams.ask(1)[2]
    wait_until(lambda: streams.server.works(1))
    assert streams.ask(1)[2]


def test_a_worker_that_ends_is_replaced_by_flower_and_a_supernode_that_is_gone_is_lost(streams):
    streams.connect(1, 2)
    for node in (1, 2):
        streams.nodes[node].free.clear()
    keys = [streams.push(node) for node in (1, 2)]
    wait_until(lambda: all(len(streams.nodes[node].tasks) == 2 for node in (1, 2)))
    streams.nodes[1].stream.leave(gone=False)
    streams.nodes[2].stream.leave(gone=True)
    streams.nodes[1].free.set()
    mine, theirs = streams.pull(*keys)
    assert from_record(mine.content)[0] == "task-of-1" and "SuperNode is gone" in theirs.error.reason
    assert streams.grid.get_node_ids() == [1, 3]
    streams.nodes[2].free.set()


def test_a_task_that_takes_longer_than_the_server_waits_ends_the_worker(streams):
    streams.connect(1)
    streams.nodes[1].free.clear()
    streams.push(1, seconds=0.3)
    wait_until(lambda: streams.nodes[1].ended == ["a task took longer than the server waits"])
    streams.nodes[1].free.set()


def test_a_node_that_flower_knows_no_more_has_no_stream(streams):
    streams.connect(1, 2)
    del streams.nodes[1]
    assert streams.grid.get_node_ids() == [2, 3]
    assert not streams.server.works(1) and streams.server.works(2)


def test_workers_move_over_to_the_server_that_takes_up_the_run(streams):
    streams.connect(1)
    call(streams.server._server.stop(None))  # as a kill does: no leave is taken
    port = free_port()
    again = StreamServer(f"localhost:{port}", f"127.0.0.1:{port}")
    again.open()
    successor = Streams(again, streams.nodes)
    successor.connect(1)
    assert successor.ask(1) == ("task-of-1", b"x", True)
    again.close()


def open_stream(address, offer, secret):
    """What the server says to a secret: the first frame, or gRPC's code."""
    credentials = grpc.ssl_channel_credentials(offer.certificate.encode())
    with grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", offer.name)]) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(()), metadata=secret, timeout=20)
        try:
            return next(call)
        except grpc.RpcError as error:
            return error.code()


def test_no_secret_opens_a_stream_but_one_that_was_given_out_and_not_used(streams):
    streams.connect(1)
    offer = streams.nodes[1].offers[0]
    for metadata in ((), ((SECRET, "0" * 64),), ((SECRET, offer.secret),), ((SECRET, ""),)):
        assert open_stream(streams.wire.address, offer, metadata) is grpc.StatusCode.UNAUTHENTICATED
    assert streams.ask(1)[2], "strangers disturbed a node"
    # An offer that was not used yet opens one, and not a second.
    unused = streams.server.offer(3)
    assert isinstance(open_stream(streams.wire.address, unused, ((SECRET, unused.secret),)), bytes)
    again = open_stream(streams.wire.address, unused, ((SECRET, unused.secret),))
    assert again is grpc.StatusCode.UNAUTHENTICATED


def test_a_node_speaks_to_no_server_but_the_one_that_flower_named(streams):
    """Somebody in between has no key for the certificate: the secret is never sent."""
    other = StreamServer("localhost:1", f"127.0.0.1:{free_port()}")
    other.open()
    offer = streams.server.offer(1)
    heard = []
    other._serve = lambda *call: heard.append(call)
    stream = Stream(streams.nodes[1], lambda reason: None)
    stream.follow(Offer(other._listen, False, offer.name, offer.certificate, offer.secret))
    code = open_stream(other._listen, offer, ((SECRET, offer.secret),))
    assert code is grpc.StatusCode.UNAVAILABLE and not heard
    other.close()


@pytest.mark.parametrize(
    "change", [{"address": "x y:1"}, {"name": "../x"}, {"secret": "short"}, {"shared": 1}, {"certificate": 5}]
)
def test_a_damaged_offer_is_refused(streams, change):
    sound = vars(streams.server.offer(1))
    with pytest.raises(ProtocolError, match="damaged offer"):
        Offer(**(sound | change))
    for text in ("", "[]", "{}", "nonsense"):
        with pytest.raises(ProtocolError):
            decode_offer(text)
    assert sound["secret"] not in repr(Offer(**sound))
