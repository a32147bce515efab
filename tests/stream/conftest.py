"""Streams in one process: a server, and nodes that answer Flower's messages and open the streams that they get."""

import contextlib
import socket
import threading
import time

import pytest

from client_app import stream
from client_app.stream import Stream
from deploy.common.processes import free_port
from fedtune_strategies.protocol.flower import address
from fedtune_strategies.protocol.records import from_record, offer_in
from fedtune_strategies.stream import server as stream_server
from fedtune_strategies.stream.grid import StreamGrid
from fedtune_strategies.stream.offer import decode_offer
from fedtune_strategies.stream.server import StreamServer
from fedtune_strategies.testing import InMemoryGrid

PATIENCE = 30.0


class Flower(InMemoryGrid):
    """Flower's messages: carries offers to nodes, and counts what went this way and its bytes."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.count = self.carried = 0

    def _answer(self, message):
        self.count += 1
        self.carried += len(from_record(message.content)[1])
        node, offer = self.nodes[message.metadata.dst_node_id], offer_in(message.content)
        if offer:
            node.offered(decode_offer(offer))
        return super()._answer(message)


class StreamingNode:
    """A node that answers with its own id; ``blocked`` where it cannot reach streams."""

    def __init__(self, number, blocked=False):
        self.number, self.blocked, self.ended, self.offers, self.tasks = number, blocked, [], [], []
        self.free = threading.Event()  # cleared, it works on its task until set
        self.free.set()
        self.step = (0, 0)
        self.stream = Stream(self, self.ended.append, lambda: self.step)

    def __call__(self, kind, payload):
        self.tasks.append(bytes(payload[:64]))
        self.free.wait(PATIENCE)
        return f"{kind}-of-{self.number}", payload

    def offered(self, offer):
        self.offers.append(offer)
        if not self.blocked:
            self.stream.follow(offer)


class Wire:
    """A TCP connection's way, which can be cut, or frozen so that nothing comes through and nobody is told."""

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs, self.flows, self.open, self.carried, self.cut_after = [], threading.Event(), True, 0, None
        self.flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self):
        return f"localhost:{self._listener.getsockname()[1]}"

    def cut(self):
        pairs, self._pairs = self._pairs, []
        for one in pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                if not self.open:
                    ours.close()
                    continue
                theirs = socket.create_connection(("127.0.0.1", self._target))
                self._pairs += [ours, theirs]
                for pair in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.flows.wait()
                self.carried += len(data)
                sink.sendall(data)
                if self.cut_after is not None and self.carried > self.cut_after:
                    self.cut_after = None
                    self.cut()
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.flows.set()
        self._listener.close()
        self.cut()


class Streams:
    """A grid over both ways."""

    def __init__(self, server, nodes):
        self.server, self.nodes = server, nodes
        self.flower = Flower(nodes)
        self.grid = StreamGrid(self.flower, server)

    def push(self, node, payload=b"x", seconds=60.0):
        message = address(node, "task", payload, 1)
        message.metadata.ttl = seconds
        return self.grid.push_messages([message])[0]

    def pull(self, *keys):
        """Wait for the replies to some messages."""
        found = {}
        wait_until(lambda: found.update({r.metadata.reply_to_message_id: r for r in self.grid.pull_messages(keys)})
                   or len(found) == len(keys))  # fmt: skip
        return [found[key] for key in keys]

    def ask(self, node, payload=b"x"):
        """Send a task; returns the reply's kind and payload, and whether it came by a stream."""
        before = self.flower.count
        (reply,) = self.pull(self.push(node, payload))
        return *from_record(reply.content), self.flower.count == before

    def connect(self, *nodes):
        """Greet nodes by Flower and wait for their streams."""
        for node in nodes:
            self.ask(node)
            wait_until(lambda node=node: self.server.works(node))


def wait_until(condition, seconds=PATIENCE):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def streams():
    """Two nodes that stream over a wire, and one that cannot."""
    port = free_port()
    wire = Wire(port)
    server = StreamServer(wire.address, f"127.0.0.1:{port}")
    server.open()
    made = Streams(server, {1: StreamingNode(1), 2: StreamingNode(2), 3: StreamingNode(3, blocked=True)})
    made.wire, made.port = wire, port
    yield made
    wire.close()
    for node in made.nodes.values():
        node.stream.leave(gone=False)
    server.close()


@pytest.fixture
def quick(monkeypatch):
    """Shorter patience, so that losses are seen soon."""
    monkeypatch.setattr(stream_server, "SILENT_S", 1.0)
    monkeypatch.setattr(stream_server, "IDLE_SILENT_S", 1.0)
    monkeypatch.setattr(stream_server, "RECONNECT_S", 1.0)
    monkeypatch.setattr(stream_server, "_LOOK_S", 0.1)
    monkeypatch.setattr(stream, "BEAT_S", 0.2)
    monkeypatch.setattr(stream, "IDLE_BEAT_S", 0.2)
