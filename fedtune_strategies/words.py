"""Numbers as people read them."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Say how many: ``1 round``, ``1,200 rounds``, ``2 replies``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
