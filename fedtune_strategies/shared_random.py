"""Random choices that both sides of the network make alike, from keys alone.

Only raw Philox output is used and turned into choices by integer arithmetic, so a draw is the same on every
machine and with every release of NumPy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def digest(*key: int | str) -> bytes:
    """Return 16 bytes that a key decides, and that tell nothing of it.

    Parameters
    ----------
    *key : int or str
        For example a purpose, run seed, round and a secret.

    Returns
    -------
    bytes
        The digest.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def stream(*key: int | str) -> np.random.Philox:
    """Open the random stream that belongs to a key.

    Parameters
    ----------
    *key : int or str
        For example run seed, purpose, round and node.

    Returns
    -------
    numpy.random.Philox
        A bit generator; take its ``random_raw``.
    """
    return np.random.Philox(key=np.frombuffer(digest(*key), dtype="<u8"))


def sample(key: Sequence[int | str], names: Sequence[str], count: int) -> list[str]:
    """Choose names without repetition.

    Parameters
    ----------
    key : sequence of int or str
        Run seed and round.
    names : sequence of str
        The candidates; their order does not matter.
    count : int
        How many to choose, at most ``len(names)``.

    Returns
    -------
    list of str
        The chosen names, sorted.
    """
    ranked = sorted(names, key=lambda name: int(stream("sample", *key, name).random_raw()))
    return sorted(ranked[:count])
