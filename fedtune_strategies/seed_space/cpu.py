"""Both pools on the CPU: the same bits as the reference, at a fraction of its time.

The public functions are those of `reference`; the loops are in `compiled`. They release the interpreter lock, so that
the caller may split a tensor over threads.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedtune_strategies.seed_space import compiled, reference
from fedtune_strategies.seed_space.philox import BITS, ELEMENT_SIGNS, MASK, NORMALS, SEED_SIGNS, stream
from fedtune_strategies.seed_space.reference import Moves

__all__ = [
    "DTYPES",
    "gaussian_project",
    "gaussian_rebuild",
    "walsh_add",
    "walsh_project",
    "walsh_rebuild",
    "word_sums",
]

DTYPES = {
    torch.float32,
    torch.bfloat16,
}  # numba has no 16-bit numbers: those of bfloat16 are the high half of float32's


def walsh_add(
    out: Tensor, weight: Tensor, moves: Moves, key: int, name: str, columns: int, block: int, start: int = 0
) -> None:
    """As `reference.walsh_add`; `start` a multiple of 128 and of `columns`."""
    signs = _pair(key), _stream(name, ELEMENT_SIGNS), _stream(name, SEED_SIGNS)
    seeds, factors = np.array([k for k, _ in moves], np.int64), np.array([c for _, c in moves], np.float32)
    compiled.walsh_add(_stored(out), _stored(weight), seeds, factors, *signs, columns, block, start)


def walsh_rebuild(
    out: Tensor, base: Tensor, theta: Tensor, key: int, name: str, columns: int, block: int, start: int = 0
) -> None:
    """As `reference.walsh_rebuild`; `start` a multiple of 128 and of `columns`."""
    signs = _pair(key), _stream(name, ELEMENT_SIGNS), _stream(name, SEED_SIGNS)
    compiled.walsh_rebuild(_stored(out), _stored(base), out is base, theta.numpy(), *signs, block, start)


def gaussian_rebuild(
    out: Tensor, base: Tensor, seeds: Tensor, factors: Tensor, key: int, name: str, start: int = 0
) -> None:
    """As `reference.gaussian_rebuild`."""
    order = seeds.numpy().astype(np.uint32)
    compiled.gaussian_rebuild(
        _stored(out), _stored(base), order, factors.numpy(), _pair(key), _stream(name, NORMALS), start
    )


def walsh_project(delta: Tensor, key: int, name: str, columns: int, block: int, start: int = 0) -> Tensor:
    """As `reference.walsh_project`, which serves short rows; `start` a multiple of 128 and of `columns`.

    The result is float32, and scratch memory that the thread's next call overwrites.
    """
    if columns < BITS:
        return reference.walsh_project(delta, key, name, columns, block, start)
    signs = _pair(key), _stream(name, ELEMENT_SIGNS), _stream(name, SEED_SIGNS)
    total, sums, spare, words = _scratch(columns)
    compiled.walsh_project(total, sums, spare, words, delta.numpy(), *signs, block, start)
    return torch.from_numpy(total)


def gaussian_project(delta: Tensor, size: int, key: int, name: str, start: int = 0) -> Tensor:
    """As `reference.gaussian_project`."""
    total = np.zeros(size)
    compiled.gaussian_project(total, delta.numpy(), _pair(key), _stream(name, NORMALS), start)
    return torch.from_numpy(total)


def word_sums(words: Tensor, start: int = 0) -> tuple[int, int]:
    """As `reference.word_sums`."""
    first, second = compiled.word_sums(words.numpy().view(np.uint64), start)
    return int(first), int(second)


_kept = threading.local()


def _scratch(columns: int) -> tuple[np.ndarray, ...]:
    """Memory of this thread, kept between calls: new pages cost more than the sums that they hold."""
    if getattr(_kept, "columns", 0) != columns:
        words = np.empty(columns // 32, np.uint32)
        _kept.columns, _kept.arrays = columns, (*(np.empty(columns, np.float32) for _ in range(3)), words)
    return _kept.arrays


def _stored(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _pair(key: int) -> np.ndarray:
    return np.array([key & MASK, key >> 32], np.uint32)


@lru_cache(maxsize=1 << 14)
def _stream(name: str, domain: int) -> np.ndarray:
    return np.array(stream(name, domain), np.uint32)
