"""Addresses at which machines reach one another."""

from __future__ import annotations

import contextlib
import socket

from fedtune_strategies.errors import LinkError


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port``.

    Raises
    ------
    LinkError
        It is neither.
    """
    host, found, port = address.rpartition(":")
    if not found or not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise LinkError(f"address {address!r}: write it as host:port, such as my.server.example:9092")
    return host.removeprefix("[").removesuffix("]"), int(port)


def own_host() -> str:
    """The address by which others most likely reach this machine: that of its way out."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # reserved for documentation: nothing is sent
        return str(probe.getsockname()[0])
    return "127.0.0.1"
