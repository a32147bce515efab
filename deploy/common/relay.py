"""Passing a TCP connection on, byte for byte, with a count."""

from __future__ import annotations

import asyncio
import math

CHUNK = 1 << 16


async def relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: list[int], way: int, bandwidth: float = math.inf
) -> None:
    """Pass on one direction of a connection until its end, and count its bytes in ``counts[way]``."""
    while data := await reader.read(CHUNK):
        counts[way] += len(data)
        await asyncio.sleep(len(data) / bandwidth)
        writer.write(data)
        await writer.drain()
    writer.write_eof()
