"""Passing a TCP connection on, byte for byte, with a count."""

from __future__ import annotations

import asyncio

CHUNK = 1 << 16


async def relay(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    counts: list[int],
    way: int,
    *,
    first: float | None = None,
    idle: float | None = None,
) -> None:
    """Pass on one direction of a connection until its end, and count its bytes in ``counts[way]``.

    Raises `TimeoutError`: nothing came within ``first`` seconds, or within ``idle`` seconds after something had; None
        waits for ever.
    """
    patience = first
    while True:
        async with asyncio.timeout(patience):
            data = await reader.read(CHUNK)
        if not data:
            break
        counts[way] += len(data)
        patience = idle
        writer.write(data)
        await writer.drain()
    writer.write_eof()
