"""What streams cost a server: many that are idle, and one long message to one node.

    python benchmarks/streams.py [--streams 1000] [--seconds 20] [--megabytes 1000]

Nodes are in a process of their own. Prints the server's memory and processor time for idle streams; for the long
message the seconds, and the peak memory beyond the message itself of server and node.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import psutil

from client_app.stream import Stream
from deploy.common.processes import free_port
from fedtune_strategies.stream.offer import decode_offer
from fedtune_strategies.stream.server import StreamServer


def nodes() -> None:
    """Open a stream for each offer that comes in, and answer each message with its length and this process's peak."""
    streams = []

    def answer(kind: str, payload: bytes) -> tuple[str, bytes]:
        return kind, json.dumps([len(payload), peak()]).encode()

    for line in sys.stdin:
        streams.append(Stream(answer, lambda reason: None))
        streams[-1].follow(decode_offer(line))


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def connect(server: StreamServer, child: subprocess.Popen[str], first: int, count: int) -> None:
    """Let the other process open so many streams."""
    assert child.stdin
    for node in range(first, first + count):
        child.stdin.write(server.offer(node).encode() + "\n")
    child.stdin.flush()
    while not all(server.works(node) for node in range(first, first + count)):
        time.sleep(0.2)


def ask(server: StreamServer, node: int, payload: bytes) -> tuple[int, int]:
    """Send a message; returns the node's answer."""
    server.send(node, "key", "task", payload, 600.0)
    while not (outcomes := server.outcomes()):
        server.wait(1.0)
    assert outcomes[0].reply, outcomes[0].lost
    length, top = json.loads(outcomes[0].reply[1])
    return length, top


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--nodes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nodes:
        nodes()
        return
    address = f"127.0.0.1:{free_port()}"
    server = StreamServer(address, address)
    server.open()
    me = psutil.Process()
    command = [sys.executable, "-P", __file__, "--nodes"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as child:
        connect(server, child, 0, 1)
        payload = bytes(args.megabytes * 10**6)
        _, there = ask(server, 0, b"")
        before, start = peak(), time.monotonic()
        length, top = ask(server, 0, payload)
        took = time.monotonic() - start
        assert length == len(payload)
        print(
            f"{args.megabytes} MB to one node: {took:.1f} s; beyond the message the server's peak grew by "
            f"{(peak() - before) / 1e6:.0f} MB, the node's by {(top - there - length) / 1e6:.0f} MB",
            flush=True,
        )
        del payload
        before = me.memory_info().rss
        connect(server, child, 1, args.streams)
        grown, times = me.memory_info().rss - before, me.cpu_times()
        time.sleep(args.seconds)
        spent = me.cpu_times()
        share = (spent.user + spent.system - times.user - times.system) / args.seconds
        print(f"{args.streams} idle streams: {grown / 1e6:.0f} MB, {share:.1%} of a core on the server")
        child.terminate()
    server.close()


if __name__ == "__main__":
    main()
