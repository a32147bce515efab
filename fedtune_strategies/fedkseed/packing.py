"""Numbers in few bytes: whole numbers without loss, scalars with a stated one."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.errors import ProtocolError

SCALAR_TYPES = {32: torch.float32, 16: torch.float16, 8: torch.int8}
_WORD_BYTES = 4
_NOT_FINITE = -128


def pack(values: NDArray[np.int32]) -> Tensor:
    """Pack whole numbers, small or mostly zero ones into few bytes.

    The common power of two is taken out, signs go into the lowest bit, and the bytes are sorted by their weight before
    DEFLATE (RFC 1951) meets them: numbers below 128 in magnitude never need more than a byte each.

    Returns: uint8, a byte with the power of two and the packed rest.
    """
    bits = int(np.bitwise_or.reduce(values)) if values.size else 0
    shift = (bits & -bits).bit_length() - 1 if bits else 0
    small = values >> shift
    unsigned = ((small << 1) ^ (small >> 31)).astype("<u4")
    planes = np.ascontiguousarray(unsigned.view(np.uint8).reshape(-1, _WORD_BYTES).T)
    used = max(1, -(-int(unsigned.max(initial=0)).bit_length() // 8))
    body = zlib.compress(planes[:used].tobytes(), 9, wbits=-15)
    return torch.frombuffer(bytearray([shift]) + body, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> NDArray[np.int32]:
    """Undo `pack`.

    `count`: how many numbers there must be.
    Raises `ProtocolError`: the bytes are damaged, or there is another number of numbers in them.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.numel():
        raise ProtocolError("received packed numbers that are no bytes.")
    shift, body = int(packed[0]), packed[1:].numpy().tobytes()
    opened = zlib.decompressobj(wbits=-15)
    try:
        raw = opened.decompress(body, _WORD_BYTES * count + 1)
    except zlib.error as error:
        raise ProtocolError(f"received damaged packed numbers: {error}.") from None
    used, rest = divmod(len(raw), max(count, 1))
    if not opened.eof or rest or not 1 <= used <= _WORD_BYTES or shift > 30:
        raise ProtocolError(f"received packed numbers that are not {count}.")
    planes = np.zeros((_WORD_BYTES, count), dtype=np.uint8)
    planes[:used] = np.frombuffer(raw, dtype=np.uint8).reshape(used, count)
    unsigned = np.ascontiguousarray(planes.T).view("<u4").reshape(-1)
    small = (unsigned >> 1).astype(np.int32) ^ -(unsigned & 1).astype(np.int32)
    return small << np.int32(shift)


def round_scalars(scalars: NDArray[np.float32], bits: int) -> tuple[Tensor, float]:
    """Round the scalars of a node for the wire.

    `scalars`: scalars; NaN where a step was skipped.
    `bits`: float32, float16, or int8 with one scale.
    Returns: the rounded scalars and their unit; see `read_scalars`.
    """
    if bits == 32:
        return torch.from_numpy(scalars), 1.0
    finite = np.isfinite(scalars)
    largest = float(np.abs(scalars[finite]).max(initial=0.0)) or 1.0
    if bits == 16:  # with a unit, since float16 ends at 65504
        return torch.from_numpy((scalars / np.float32(largest)).astype(np.float16)), largest
    unit = largest / 127
    whole = np.where(finite, np.rint(np.where(finite, scalars, 0.0) / unit), _NOT_FINITE)
    return torch.from_numpy(whole.astype(np.int8)), unit


def read_scalars(rounded: Tensor, unit: float) -> NDArray[np.float32]:
    """Undo `round_scalars`, up to its rounding.

    `rounded`: float32, float16 or int8, shape [tau].
    Returns: scalars; NaN where a step was skipped.
    """
    values = rounded.numpy().astype(np.float32) * np.float32(unit)
    return (
        np.where(rounded.numpy() == _NOT_FINITE, np.float32(np.nan), values) if rounded.dtype == torch.int8 else values
    )
