"""Both pools in plain torch: readable, runs on any device, defines the bits.

Every function works on a flat float32 run of one parameter: elements `start`, `start + 1`, … of the flattened tensor.
`start` is a multiple of 4 (gaussian) or of the pool's number of columns (walsh). `out` may be `weight` itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune_strategies.seed_space.philox import (
    ELEMENT_SIGNS,
    MASK,
    NORMALS,
    SEED_SIGNS,
    philox,
    signs,
    signs_at,
    stream,
)

Moves = Sequence[tuple[int, float]]
"""Seeds and factors."""

DTYPES = {torch.float32}  # what kernels load and store
TILE = 1 << 18  # elements that are worked on at once: bounds the scratch memory


def fwht(x: Tensor, stride: int = 1) -> Tensor:
    """Fast Walsh-Hadamard transform of the last dimension: ``y[j] = sum_k (-1)**popcount(j & k) * x[k]``.

    Butterflies go from neighbours outward: stride 1, 2, 4, … (or from `stride` on); each adds and subtracts once in
    float32. This order is part of the definition of a pool, since it decides the rounding of every sum.
    """
    n = x.shape[-1]
    while stride < n:
        left, right = x.reshape(-1, n // (2 * stride), 2, stride).unbind(2)
        x = torch.stack((left + right, left - right), dim=2).reshape(x.shape)
        stride *= 2
    return x


def walsh_column(k: int, n: int, device: torch.device | str) -> Tensor:
    """Column k of the n × n Walsh-Hadamard matrix, n a power of two: float32 [n], ``(-1)**popcount(j & k)``."""
    column = torch.ones(1, device=device)
    for bit in range(n.bit_length() - 1):
        column = torch.cat((column, -column if k >> bit & 1 else column))
    return column


def walsh_add(
    out: Tensor, weight: Tensor, moves: Moves, key: int, name: str, columns: int, block: int, start: int = 0
) -> None:
    """Write ``weight + c_1 * z_{k_1} + c_2 * z_{k_2} + …`` into `out`: float32 additions in that order."""
    device = weight.device
    element_signs, seed_signs = stream(name, ELEMENT_SIGNS), stream(name, SEED_SIGNS)
    tile = max(TILE, columns)
    for low in range(0, len(weight), tile):
        n = min(tile, len(weight) - low)
        rows = torch.arange((start + low) // columns, -(-(start + low + n) // columns), device=device)
        element = signs(key, element_signs, start + low, n, device)
        source = weight[low : low + n]
        for k, c in moves:
            column = walsh_column(k, columns, device) * torch.tensor(c, dtype=torch.float32, device=device)
            seed = signs_at(key, seed_signs, rows * columns // block * columns + k)
            z = (seed[:, None] * column).reshape(-1)[:n] * element
            source = torch.add(source, z, out=out[low : low + n])


def walsh_rebuild(
    out: Tensor, base: Tensor, theta: Tensor, key: int, name: str, columns: int, block: int, start: int = 0
) -> None:
    """Write ``base + sum_k theta_k * z_k`` into `out`: per block ``D * fwht(E * theta)``, added to the base once.

    theta is padded with zeros to [columns].
    """
    device = base.device
    element_signs, seed_signs = stream(name, ELEMENT_SIGNS), stream(name, SEED_SIGNS)
    tile = max(TILE, columns)
    for low in range(0, len(base), tile):
        n = min(tile, len(base) - low)
        first, last = (start + low) // block, -(-(start + low + n) // block)
        mixed = signs(key, seed_signs, first * columns, (last - first) * columns, device).reshape(-1, columns) * theta
        rows = torch.arange((start + low) // columns, -(-(start + low + n) // columns), device=device)
        sums = fwht(mixed)[rows * columns // block - first].reshape(-1)[:n]
        sums *= signs(key, element_signs, start + low, n, device)
        torch.add(base[low : low + n], sums, out=out[low : low + n])


def walsh_project(delta: Tensor, key: int, name: str, columns: int, block: int, start: int = 0) -> Tensor:
    """Inner products ⟨delta, z_k⟩ for all k, float64 [columns]: the transpose of `walsh_rebuild`."""
    device = delta.device
    element_signs, seed_signs = stream(name, ELEMENT_SIGNS), stream(name, SEED_SIGNS)
    total = torch.zeros(columns, dtype=torch.float64, device=device)
    tile = max(TILE, columns)
    for low in range(0, len(delta), tile):
        n = min(tile, len(delta) - low)
        signed = delta[low : low + n] * signs(key, element_signs, start + low, n, device)
        rows = torch.nn.functional.pad(signed, (0, -n % columns)).reshape(-1, columns)
        numbers = torch.arange((start + low) // columns, (start + low) // columns + len(rows), device=device)
        blocks = numbers * columns // block
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        seed = signs(key, seed_signs, first * columns, (last - first) * columns, device).reshape(-1, columns)
        total += (fwht(rows) * seed[blocks - first]).sum(dim=0, dtype=torch.float64)
    return total


def normals(key: int, words: tuple[int, int], k: int, start: int, count: int, device: torch.device | str) -> Tensor:
    """Standard normal numbers, float32 [count], by Box-Muller, with multiplications and additions in a fixed order.

    Logarithm, sine and cosine are short power series, so the bits depend on no mathematical library. Each counter
    ``(element // 4, k, words)`` gives four normals. The largest possible magnitude is 5.77.
    """
    first, last = start // 4, -(-(start + count) // 4)
    numbers = philox((torch.arange(first, last, device=device), k, *words), key, device)
    radius_bits, angle_bits = numbers[:, 0::2], numbers[:, 1::2]

    # u in (0, 1), an odd multiple of 2**-24; u = m * 2**e with m in [1/sqrt(2), sqrt(2)); log m = 2 artanh(s).
    u = ((radius_bits >> 9) * 2 + 1).to(torch.float32) * 2.0**-24
    bits = u.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(torch.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    log_u = _odd_series(s, (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)) + exponent * math.log(2.0)
    radius = (-2.0 * log_u).to(torch.float64).sqrt().to(torch.float32)  # float32 sqrt is not always exact in torch

    # Angle: quadrant from the top two bits, the rest an odd multiple of 2**-24 in (-1/2, 1/2) quarter turns.
    quadrant = angle_bits >> 30
    turn = (((angle_bits << 2 & MASK) >> 9) * 2 + 1).to(torch.float32) * 2.0**-24 - 0.5
    x = turn * (math.pi / 2)
    sine = _odd_series(x, (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0))
    cosine = _even_series(x, (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0))
    odd = quadrant % 2 == 1
    first_of_pair = torch.where(odd, sine, cosine) * torch.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    second_of_pair = torch.where(odd, cosine, sine) * torch.where(quadrant >= 2, -1.0, 1.0)
    pairs = torch.stack((radius * first_of_pair, radius * second_of_pair), dim=-1)
    return pairs.reshape(-1)[start - first * 4 :][:count]


def _even_series(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule in x², highest power first."""
    square = x * x
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * square + coefficient
    return total


def _odd_series(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """``x`` times `_even_series`."""
    return _even_series(x, coefficients) * x


def gaussian_rebuild(
    out: Tensor, base: Tensor, seeds: Tensor, factors: Tensor, key: int, name: str, start: int = 0
) -> None:
    """Write ``base + sum_i factors_i * z_{seeds_i}`` into `out`: a sum in that order, added to the base once."""
    words = stream(name, NORMALS)
    for low in range(0, len(base), TILE):
        n = min(TILE, len(base) - low)
        total = torch.zeros(n, device=base.device)
        for k, factor in zip(seeds.tolist(), factors, strict=True):
            total += normals(key, words, k, start + low, n, base.device) * factor
        torch.add(base[low : low + n], total, out=out[low : low + n])


def gaussian_project(delta: Tensor, size: int, key: int, name: str, start: int = 0) -> Tensor:
    """Inner products ⟨delta, z_k⟩ for all k < size, float64."""
    words = stream(name, NORMALS)
    total = torch.zeros(size, dtype=torch.float64, device=delta.device)
    for low in range(0, len(delta), TILE):
        part = delta[low : low + TILE].to(torch.float64)
        for k in range(size):
            total[k] += torch.dot(part, normals(key, words, k, start + low, len(part), delta.device).to(torch.float64))
    return total


GOLDEN = 0x9E3779B97F4A7C15
"""What the fingerprint adds to a word for each place: odd, so that no two places look alike."""
LOW = (1 << 32) - 1


def word_sums(words: Tensor, start: int = 0) -> tuple[int, int]:
    """Two sums modulo 2**64 of the words of some memory, int64 [n]: what a fingerprint is made of.

    The first is of the words themselves, so a change of one word always changes it. The second is of each word mixed
    with its place: twice its halves are multiplied, 32 bits by 32, which processors do in vectors, and what went in is
    added back, as a half may be 0. Sums modulo 2**64 are the same in any order. `start` is the place of the first word.
    """
    first = second = 0
    for low in range(0, len(words), TILE):
        part = words[low : low + TILE]
        x = part + torch.arange(start + low + 1, start + low + 1 + len(part), device=part.device) * _signed(GOLDEN)
        y = _halves_multiplied(x) ^ (x << 32 | x >> 32 & LOW)
        first, second = first + int(x.sum()), second + int((_halves_multiplied(y) ^ x).sum())
    return first % 2**64, second % 2**64


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - (word >> 63 << 64)


def _halves_multiplied(x: Tensor) -> Tensor:
    """The product of the lower and the upper 32 bits, as unsigned numbers."""
    return (x & LOW) * (x >> 32 & LOW)
