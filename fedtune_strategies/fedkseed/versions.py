"""Theta on the wire: which node holds which version, and the shortest way from there to the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.fedkseed.packing import pack

# Theta is a whole number of units, 2**10 or more to a step size, and stays exact in float32.
_UNITS_PER_STEP = 10
LARGEST = 2**24 - 1


def unit_of(lr: float) -> float:
    """Return the unit of theta for a step size: a power of two, 1024 to 2048 of which make up the step size."""
    return math.ldexp(1.0, math.frexp(lr)[1] - 1 - _UNITS_PER_STEP)


def round_move(move: NDArray[np.float64], bits: int) -> NDArray[np.int32]:
    """Round a move of theta so coarsely that every entry fits into some bits.

    `bits`: bits of an entry, sign included.
    Returns: multiples of one power of two, within plus or minus `LARGEST`.
    """
    largest = min(float(np.abs(move).max(initial=0.0)), LARGEST)
    shift = max(0, math.frexp(largest / (2 ** (bits - 1) - 1))[1]) if largest else 0
    return np.clip(np.rint(np.clip(move, -LARGEST, LARGEST) / 2**shift) * 2**shift, -LARGEST, LARGEST).astype(np.int32)


class Versions:
    """Theta after each round that some node still holds.

    Version v is theta after round v, a row of K whole numbers for each pool; its last row belongs to the pool of round
    v + 1, those before will not change any more. Version 0 is zero, which every node has. Nothing of this is stored: a
    server that was restarted sends theta in full once.
    """

    def __init__(self) -> None:
        self._points: dict[int, list[NDArray[np.int32]]] = {}
        self._held: dict[str, int] = {}

    def add(self, version: int, rows: Sequence[NDArray[np.int32]]) -> None:
        """Take up the newest version, in units, and drop those that no node holds."""
        held = set(self._held.values())
        self._points = {number: point for number, point in self._points.items() if number in held}
        self._points[version] = list(rows)

    def hold(self, node: str, version: int) -> None:
        """Note that a node holds a version."""
        self._held[node] = version

    def forget(self, node: str) -> None:
        """Note that a node holds nothing but the base model."""
        self._held.pop(node, None)

    def since(self, node: str) -> int:
        """Return the version that a node holds."""
        return self._held.get(node, 0)

    def change(self, since: int, version: int) -> tuple[int, Tensor]:
        """Pack what leads to a version: from a held one, or in full where that is shorter.

        `since`: the version that the node holds.
        `version`: the version that it is to have.
        Returns: the version from which the packed change counts, and the change of that version's last row and of all
            rows behind it.
        """
        newest = self._points[version]
        full = (0, pack(np.concatenate(newest)))
        if since not in self._points:
            return full
        held = self._points[since]
        first, *new = newest[len(held) - 1 :]
        change = (since, pack(np.concatenate([first - held[-1], *new])))
        return min(full, change, key=lambda way: way[1].numel())
