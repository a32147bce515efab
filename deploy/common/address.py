"""Addresses at which machines reach one another."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from fedtune_strategies.errors import ConfigError, LinkError


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port``."""
    host, found, port = address.rpartition(":")
    if not found or not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise LinkError(f"address {address!r}: write it as host:port, such as my.server.example:9092")
    return host.removeprefix("[").removesuffix("]"), int(port)


def split_listen(where: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port`` of an address to listen on; port 0 is a free one."""
    host, found, port = where.rpartition(":")
    host = host.strip("[]")
    if not found or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigError(f"{where!r} is no address to listen on: write it as host:port, such as 127.0.0.1:9096")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def own_host() -> str:
    """The address by which others most likely reach this machine: that of its way out."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # reserved for documentation: nothing is sent
        return str(probe.getsockname()[0])
    return "127.0.0.1"
