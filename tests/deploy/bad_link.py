"""A slow, lossy link with address translation between two network namespaces: ``bad_link.py INSIDE OUTSIDE``.

A TUN device in each; packets go from one to the other late, at a limited rate, and some never. What comes from inside
leaves with the router's address and a port of its choice, and only answers find their way back: nobody outside can
open a connection to the inside. TCP over IPv4 alone; the kernel makes whole check sums for TUN devices.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

INSIDE, ROUTER, OUTSIDE = "10.99.0.2", "10.77.9.2", "10.77.9.1"
DELAY, RATE, LOSS = 0.04, 250_000.0, 0.02  # seconds one way, bytes a second each way, part of the packets
MOST_QUEUED = 0.5  # seconds; what would wait longer is dropped, as a router's full buffer does
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET, TCP = 0x400454CA, 0x0001, 0x1000, 0x40000000, 6


def open_tun(namespace, name):
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:  # noqa: PTH123
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def address(text):
    return bytes(map(int, text.split(".")))


def checksum(data):
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def rewritten(packet, *, source=None, target=None):
    """Change an address and port of a packet, given as (address, port), and make its check sums anew."""
    head = (packet[0] & 15) * 4
    ip, tcp = bytearray(packet[:head]), bytearray(packet[head:])
    for given, at_ip, at_tcp in ((source, 12, 0), (target, 16, 2)):
        if given:
            ip[at_ip : at_ip + 4], tcp[at_tcp : at_tcp + 2] = given[0], struct.pack(">H", given[1])
    ip[10:12] = b"\0\0"
    ip[10:12] = struct.pack(">H", checksum(bytes(ip)))
    tcp[16:18] = b"\0\0"
    pseudo = bytes(ip[12:20]) + struct.pack(">BBH", 0, TCP, len(tcp))
    tcp[16:18] = struct.pack(">H", checksum(pseudo + bytes(tcp)))
    return bytes(ip + tcp)


class Translation:
    """Which port of the router stands for which connection from inside."""

    def __init__(self):
        self.ports, self.inside = {}, {}

    def out(self, packet):
        port = self.ports.setdefault(_source(packet), 40_000 + len(self.ports))
        self.inside[port] = _source(packet)
        return rewritten(packet, source=(address(ROUTER), port))

    def back(self, packet):
        """None for what nobody inside asked for."""
        owner = self.inside.get(_target(packet)[1])
        return rewritten(packet, target=owner) if owner else None


def _source(packet):
    head = (packet[0] & 15) * 4
    return packet[12:16], struct.unpack_from(">H", packet, head)[0]


def _target(packet):
    head = (packet[0] & 15) * 4
    return packet[16:20], struct.unpack_from(">H", packet, head + 2)[0]


def main(inside, outside):
    devices = open_tun(inside, "slow"), open_tun(outside, "slow")
    print("up", flush=True)
    translation, waiting, free_at, count = Translation(), [], [0.0, 0.0], 0
    translate = translation.out, translation.back
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for device in select.select(devices, [], [], pause)[0]:
            way, packet, now = devices.index(device), os.read(device, 65536), time.monotonic()
            if packet[0] >> 4 != 4 or packet[9] != TCP or random.random() < LOSS:
                continue
            free_at[way] = max(free_at[way], now) + len(packet) / RATE
            if free_at[way] - now < MOST_QUEUED and (sent := translate[way](packet)):
                count += 1
                heapq.heappush(waiting, (free_at[way] + DELAY, count, 1 - way, sent))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, way, packet = heapq.heappop(waiting)
            os.write(devices[way], packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
