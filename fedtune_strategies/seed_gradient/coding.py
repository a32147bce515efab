"""A point of seed space in one to eight bits a coefficient.

A coefficient becomes one of 2^b levels (q + 1/2) u, with q from -2^(b-1) to 2^(b-1) - 1: its sign alone at one bit. The
unit u is the one with the least squared error; what is beyond the outermost level is clipped to it. In a random basis
coefficients are alike and nearly normal, so one unit serves all.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.errors import ProtocolError

CLIPS = np.linspace(1.0, 8.0, 57)  # outermost levels that are tried, in root mean squares
ROUNDS = 4  # of fitting the unit to the levels that it chose


def encode(theta: NDArray[np.float32], bits: int) -> tuple[Tensor, float]:
    """Round a point to so many bits: the packed levels, uint8, and the unit; at one bit, twice the mean magnitude."""
    x = theta.astype(np.float64)
    rms = float(np.sqrt(np.mean(x * x))) if x.size else 0.0
    if not rms:
        return _pack(_levels(x, 1.0, bits), bits), 0.0
    half = 1 << (bits - 1)
    unit = min((rms * clip / (half - 0.5) for clip in CLIPS), key=lambda unit: _error(x, unit, bits))
    for _ in range(ROUNDS):  # the best unit for given levels, and the best levels for it: neither can do worse
        values = _levels(x, unit, bits) + 0.5
        unit = float(np.dot(x, values) / np.dot(values, values))
    unit = float(np.float32(unit))
    return _pack(_levels(x, unit, bits), bits), unit


def packed_bytes(size: int, bits: int) -> int:
    """Return how many bytes so many coefficients take."""
    return -(-size * bits // 8)


def decode(packed: Tensor, unit: float, bits: int, size: int) -> NDArray[np.float32]:
    """Undo `encode`, up to its rounding; every holder gets the same bits. What does not fit is a ProtocolError."""
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(size, bits),):
        raise ProtocolError(f"received {tuple(packed.shape)} of {packed.dtype}, not {size} levels of {bits} bits.")
    if not 0 <= unit < np.inf:
        raise ProtocolError(f"received levels with the unit {unit}.")
    levels = _unpack(packed, bits, size) - (1 << (bits - 1))
    return ((levels + 0.5) * unit).astype(np.float32)


def level_counts(packed: Tensor, bits: int, size: int) -> NDArray[np.int64]:
    """Return how many coefficients are at each level, int64 [2^bits], the lowest level first."""
    return np.bincount(_unpack(packed, bits, size), minlength=1 << bits)


def _unpack(packed: Tensor, bits: int, size: int) -> NDArray[np.int64]:
    planes = np.unpackbits(packed.numpy(), count=size * bits, bitorder="little").reshape(size, bits)
    return planes @ (1 << np.arange(bits))


def _levels(x: NDArray[np.float64], unit: float, bits: int) -> NDArray[np.float64]:
    half = 1 << (bits - 1)
    return np.clip(np.floor(x / unit), -half, half - 1)


def _error(x: NDArray[np.float64], unit: float, bits: int) -> float:
    return float(np.square(x - (_levels(x, unit, bits) + 0.5) * unit).sum())


def _pack(levels: NDArray[np.float64], bits: int) -> Tensor:
    whole = (levels + (1 << (bits - 1))).astype(np.uint8)
    planes = whole[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    return torch.from_numpy(np.packbits(planes, bitorder="little"))
