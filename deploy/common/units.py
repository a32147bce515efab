"""Bytes and seconds as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people: ``18.0 kB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.95 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any: ``1:05``, ``3:25:45``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
