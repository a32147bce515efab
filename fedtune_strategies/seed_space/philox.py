"""Philox4x32-10 random bits in plain torch: the reference that every kernel is checked against.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
The counter words that FedTune uses, and a table of test vectors, are in docs/seed-space.md.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

# Domains: the low byte of counter word 2. One per use of random bits, so that no two uses share a bit.
ELEMENT_SIGNS = 1  # D of the walsh pool
SEED_SIGNS = 2  # E of the walsh pool
NORMALS = 3  # the gaussian pool

BITS = 128  # random bits of one counter


def philox(counter: tuple[Tensor | int, Tensor | int, int, int], key: int, device: torch.device | str) -> Tensor:
    """Philox4x32-10 of many counters at once: four words in [0, 2**32) for each, int64 [n, 4]; tensors broadcast."""
    # int64 products wrap modulo 2**64, and masking after the shift recovers the unsigned high word.
    x0, x1, x2, x3 = torch.broadcast_tensors(
        *(torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    )
    key0, key1 = key & MASK, (key >> 32) & MASK
    for _ in range(10):
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x2 = ((product1 >> 32) & MASK) ^ x1 ^ key0, ((product0 >> 32) & MASK) ^ x3 ^ key1
        x1, x3 = product1 & MASK, product0 & MASK
        key0, key1 = (key0 + WEYL[0]) & MASK, (key1 + WEYL[1]) & MASK
    return torch.stack((x0, x1, x2, x3), dim=-1).reshape(-1, 4)


def stream(name: str, domain: int) -> tuple[int, int]:
    """Counter words 2 and 3 of one parameter and one use: 8 bits of domain and 56 bits of a hash of the name."""
    digest = hashlib.sha256(name.encode()).digest()
    return domain | int.from_bytes(digest[4:7], "little") << 8, int.from_bytes(digest[:4], "little")


def signs(key: int, words: tuple[int, int], start: int, count: int, device: torch.device | str) -> Tensor:
    """Random signs, float32 [count], from number `start` on: sign i is bit i mod 128 of counter i // 128; 1 is -1."""
    first, last = start // BITS, -(-(start + count) // BITS)
    numbers = philox((torch.arange(first, last, device=device), 0, *words), key, device)
    bits = (numbers[:, :, None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).reshape(-1)[start - first * BITS :][:count].to(torch.float32)


def signs_at(key: int, words: tuple[int, int], index: Tensor) -> Tensor:
    """Random signs at scattered numbers: as `signs`, one counter for each."""
    numbers = philox((index // BITS, 0, *words), key, index.device)
    word = numbers.gather(1, (index % BITS // 32)[:, None])[:, 0]
    return (1 - 2 * ((word >> index % 32) & 1)).to(torch.float32)
