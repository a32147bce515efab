import hashlib
import random
import socket
import socketserver
import threading
import time

import pytest

from deploy.local.proxy import ByteProxy, Traffic


class Echo(socketserver.BaseRequestHandler):
    """Answer with a digest line, then with everything twice."""

    def handle(self):
        received = b""
        while data := self.request.recv(1 << 16):
            received += data
        self.request.sendall(hashlib.sha256(received).digest() + received * 2)


@pytest.fixture
def server():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()


def connect(address):
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def talk(address, payload):
    with connect(address) as connection:
        connection.sendall(payload)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    return answer


def test_counts_each_node_and_way_exactly(server):
    sizes = {"a": 0, "b": 1, "c": 3_000_001}
    with ByteProxy(*server, nodes=list(sizes)) as proxy:
        for node, size in sizes.items():
            payload = random.Random(size).randbytes(size)
            assert talk(proxy.address(node), payload) == hashlib.sha256(payload).digest() + payload * 2
        assert proxy.snapshot() == {node: Traffic(size, 32 + 2 * size) for node, size in sizes.items()}


def test_counts_add_up_over_parallel_connections(server):
    with ByteProxy(*server, nodes=["a"]) as proxy:
        threads = [threading.Thread(target=talk, args=(proxy.address("a"), b"x" * 10_000)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = proxy.snapshot()["a"]
        talk(proxy.address("a"), b"xyz")
        assert before == Traffic(80_000, 8 * 20_032)
        assert proxy.snapshot()["a"] - before == Traffic(3, 38)


def test_hangs_up_while_the_server_is_away():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = listener.getsockname()
    with ByteProxy(*target, nodes=["a"]) as proxy, connect(proxy.address("a")) as connection:
        assert connection.recv(1) == b""
        assert proxy.snapshot() == {"a": Traffic()}


def test_closing_ends_open_connections_and_frees_the_ports(server):
    threads = threading.active_count()
    with ByteProxy(*server, nodes=["a"]) as proxy:
        address = proxy.address("a")
        idle = connect(address)
        idle.sendall(b"unfinished")
        while proxy.snapshot()["a"].up < 10:
            time.sleep(0.01)
    with idle:
        assert idle.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(address)
    assert threading.active_count() <= threads + 1  # the echo server may still be in its last request
