"""Both pools on CUDA and ROCm, in Triton: the same bits as the reference.

The public functions are those of `reference`, which also serves pools whose transform does not fit one program.
Kernels are launched without fusing multiplications and additions, and divide and take roots with exact rounding.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedtune_strategies.seed_space import reference
from fedtune_strategies.seed_space.philox import BITS, ELEMENT_SIGNS, MASK, NORMALS, SEED_SIGNS, stream
from fedtune_strategies.seed_space.reference import Moves, gaussian_project, walsh_project, word_sums

__all__ = [
    "DTYPES",
    "gaussian_project",
    "gaussian_rebuild",
    "walsh_add",
    "walsh_project",
    "walsh_rebuild",
    "word_sums",
]

DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # rounded once: one launch serves a whole tensor
LARGEST = 16384  # columns whose transform fits the registers of one program
TILE = 1024  # elements of one program where there is no transform
ROWS = 8  # rows of a block that share one transform

# Scalars whose value must not be compiled in: each round or tensor brings others.
SCALARS = [
    "n",
    "k",
    "c",
    "k2",
    "c2",
    "key0",
    "key1",
    "d2",
    "d3",
    "e2",
    "e3",
    "word2",
    "word3",
    "start",
    "first",
    "count",
]


def walsh_add(
    out: Tensor, weight: Tensor, moves: Moves, key: int, name: str, columns: int, block: int, start: int = 0
) -> None:
    """As `reference.walsh_add`; `start` a multiple of 128."""
    if columns < BITS:
        wide = weight.to(torch.float32)
        reference.walsh_add(wide, wide, moves, key, name, columns, block, start)
        out.copy_(wide)
        return
    signs = key & MASK, key >> 32, *stream(name, ELEMENT_SIGNS), *stream(name, SEED_SIGNS)
    programs = (triton.cdiv(len(weight), TILE),)
    for i in range(0, len(moves), 2):  # two in one pass over memory: a step's way back and the next step's way out
        (k, c), (k2, c2) = moves[i], moves[min(i + 1, len(moves) - 1)]
        sizes = start, columns, block, i + 1 < len(moves), TILE
        _walsh_add[programs](out, weight, len(weight), k, c, k2, c2, *signs, *sizes, enable_fp_fusion=False)
        weight = out


def walsh_rebuild(
    out: Tensor, base: Tensor, theta: Tensor, key: int, name: str, columns: int, block: int, start: int = 0
) -> None:
    """As `reference.walsh_rebuild`; `start` a multiple of 128 and of `columns`."""
    if columns < BITS:
        wide = base.to(torch.float32)
        reference.walsh_rebuild(wide, wide, theta, key, name, columns, block, start)
        out.copy_(wide)
        return
    if columns > LARGEST:
        _rebuild_in_two_stages(out, base, theta, key, name, columns, block, start)
        return
    signs = key & MASK, key >> 32, *stream(name, ELEMENT_SIGNS), *stream(name, SEED_SIGNS)
    rows = min(ROWS, block // columns)
    first = start // (rows * columns)
    programs = (triton.cdiv(start + len(base), rows * columns) - first,)
    sizes = columns, columns.bit_length() - 1, block, rows
    _walsh_rebuild[programs](out, base, theta, len(base), *signs, start, first, *sizes, enable_fp_fusion=False)


def _rebuild_in_two_stages(
    out: Tensor, base: Tensor, theta: Tensor, key: int, name: str, columns: int, block: int, start: int
) -> None:
    """Transform theta once for each block, near columns in registers, far ones in memory; then add it to all rows."""
    halves, first = (key & MASK, key >> 32), start // block
    blocks = triton.cdiv(start + len(base), block) - first
    sums = torch.empty(blocks, columns, dtype=torch.float32, device=base.device)
    programs = (blocks * columns // LARGEST,)
    sizes = columns, LARGEST, LARGEST.bit_length() - 1
    _walsh_near[programs](
        sums, theta, *halves, *stream(name, SEED_SIGNS), first * columns, *sizes, enable_fp_fusion=False
    )
    sums = reference.fwht(sums, LARGEST)
    programs, n = (triton.cdiv(len(base), TILE),), len(base)
    _walsh_spread[programs](
        out, base, sums, n, *halves, *stream(name, ELEMENT_SIGNS), start, first, columns, block, TILE,
        enable_fp_fusion=False,
    )  # fmt: skip


def gaussian_rebuild(
    out: Tensor, base: Tensor, seeds: Tensor, factors: Tensor, key: int, name: str, start: int = 0
) -> None:
    """As `reference.gaussian_rebuild`."""
    bits = key & MASK, key >> 32, *stream(name, NORMALS)
    programs = (triton.cdiv(len(base), TILE),)
    order = seeds.to(base.device)
    _gaussian_rebuild[programs](
        out, base, order, factors, len(seeds), len(base), *bits, start, TILE, enable_fp_fusion=False
    )


@triton.jit
def _philox(x0, x1, x2, x3, key0, key1):
    for _ in tl.static_range(10):
        product0, product1 = x0.to(tl.uint64) * 0xD2511F53, x2.to(tl.uint64) * 0xCD9E8D57
        x0 = (product1 >> 32).to(tl.uint32) ^ x1 ^ key0
        x2 = (product0 >> 32).to(tl.uint32) ^ x3 ^ key1
        x1, x3 = product1.to(tl.uint32), product0.to(tl.uint32)
        key0 = (key0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key1 = (key1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return x0, x1, x2, x3


@triton.jit
def _words(position, k, word2, word3, key0, key1):
    """Philox of a vector of positions and scalar words."""
    zero = position.to(tl.uint32) * 0
    return _philox(
        position.to(tl.uint32),
        zero + k.to(tl.uint32),
        zero + word2.to(tl.uint32),
        zero + word3.to(tl.uint32),
        zero + key0.to(tl.uint32),
        zero + key1.to(tl.uint32),
    )


@triton.jit
def _bits(first, word2, word3, key0, key1, SIZE: tl.constexpr):
    """Random bits number `first` (a multiple of 128) to ``first + SIZE - 1``, as 0 and 1."""
    position = first // 128 + tl.arange(0, SIZE // 128)
    a, b, c, d = _words(position, position * 0, word2, word3, key0, key1)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (SIZE // 32, 1))
    shifts = tl.reshape(tl.arange(0, 32), (1, 32)).to(tl.uint32)
    return tl.reshape((words >> shifts) & 1, (SIZE,))


@triton.jit
def _flip(x, bits):
    """-x where the bit is set: the sign bit of a float32 flips."""
    return (x.to(tl.uint32, bitcast=True) ^ (bits.to(tl.uint32) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _store(to, x, mask):
    """Store float32 in the dtype of the memory, rounded to nearest, ties to even; bfloat16 bit by bit.

    Triton's interpreter would cut bfloat16 off, and a GPU's rounding depends on its generation.
    """
    if to.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(to, tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(to, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _direction_bits(
    first, k, signs, key0, key1, e2, e3, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """Sign bits of z_k from element `first` on: element signs times seed signs times column k."""
    parity = ((first + tl.arange(0, SIZE)) & k).to(tl.uint32)  # k < COLUMNS
    for shift in tl.static_range(5):
        parity ^= parity >> (16 >> shift)
    # Rows are at least 128 elements long: one seed sign for each 128 neighbours.
    number = (first + 128 * tl.arange(0, SIZE // 128)) // BLOCK * COLUMNS + k
    a, b, c, d = _words(number // 128, number * 0, e2, e3, key0, key1)
    quarter = number // 32 % 4
    word = tl.where(quarter == 0, a, tl.where(quarter == 1, b, tl.where(quarter == 2, c, d)))
    seed = tl.reshape((word >> (number % 32).to(tl.uint32)) & 1, (SIZE // 128, 1))
    return signs ^ tl.reshape(tl.broadcast_to(seed, (SIZE // 128, 128)), (SIZE,)) ^ (parity & 1)


@triton.jit(do_not_specialize=SCALARS)
def _walsh_add(
    out, weight, n, k, c, k2, c2, key0, key1, d2, d3, e2, e3, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    TWO: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    low = tl.program_id(0).to(tl.int64) * SIZE
    at = low + tl.arange(0, SIZE)
    first, zero = start + low, tl.zeros((SIZE,), tl.float32)
    signs = _bits(first, d2, d3, key0, key1, SIZE)
    x = tl.load(weight + at, mask=at < n).to(tl.float32)
    x += _flip(zero + c, _direction_bits(first, k, signs, key0, key1, e2, e3, COLUMNS, BLOCK, SIZE))
    if TWO:
        x += _flip(zero + c2, _direction_bits(first, k2, signs, key0, key1, e2, e3, COLUMNS, BLOCK, SIZE))
    _store(out + at, x, at < n)


@triton.jit
def _fwht(x, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    # Each stage takes the lowest index bit and makes it the highest: after all stages the order is natural.
    for _ in tl.static_range(STAGES):
        left, right = tl.split(tl.reshape(x, (COLUMNS // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(left + right, left - right)), (COLUMNS,))
    return x


@triton.jit(do_not_specialize=SCALARS)
def _walsh_near(
    sums, theta, key0, key1, e2, e3, first, COLUMNS: tl.constexpr, NEAR: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    low = tl.program_id(0).to(tl.int64) * NEAR
    x = tl.load(theta + low % COLUMNS + tl.arange(0, NEAR))
    x = _flip(x, _bits(first + low, e2, e3, key0, key1, NEAR))
    tl.store(sums + low + tl.arange(0, NEAR), _fwht(x, NEAR, STAGES))


@triton.jit(do_not_specialize=SCALARS)
def _walsh_spread(
    out, base, sums, n, key0, key1, d2, d3, start, first, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    low = tl.program_id(0).to(tl.int64) * SIZE
    at, e = low + tl.arange(0, SIZE), start + low + tl.arange(0, SIZE)
    x = tl.load(sums + (e // BLOCK - first) * COLUMNS + e % COLUMNS, mask=at < n)
    z = _flip(x, _bits(start + low, d2, d3, key0, key1, SIZE))
    _store(out + at, tl.load(base + at, mask=at < n).to(tl.float32) + z, at < n)


@triton.jit(do_not_specialize=SCALARS)
def _walsh_rebuild(
    out, base, theta, n, key0, key1, d2, d3, e2, e3, start, first, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    e = (first + tl.program_id(0)).to(tl.int64) * (ROWS * COLUMNS)
    x = tl.load(theta + tl.arange(0, COLUMNS))
    x = _flip(x, _bits(e // BLOCK * COLUMNS, e2, e3, key0, key1, COLUMNS))
    x = _fwht(x, COLUMNS, STAGES)
    for row in range(ROWS):
        low = e + row * COLUMNS
        at = low - start + tl.arange(0, COLUMNS)
        inside = (at >= 0) & (at < n)
        z = _flip(x, _bits(low, d2, d3, key0, key1, COLUMNS))
        _store(out + at, tl.load(base + at, mask=inside).to(tl.float32) + z, inside)


@triton.jit
def _normals(radius_bits, angle_bits):
    """Two standard normals from 64 random bits; the series are those of `reference.normals`."""
    u = ((radius_bits >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.960464477539063e-08
    bits = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    q = s * s
    series = (((q * (2 / 9) + (2 / 7)) * q + (2 / 5)) * q + (2 / 3)) * q + 2.0
    log_u = series * s + exponent * 0.6931471805599453
    radius = tl.sqrt_rn(log_u * -2.0)

    quadrant = angle_bits >> 30
    rest = (((angle_bits << 2) >> 9) * 2 + 1).to(tl.int32)
    t = (rest.to(tl.float32) * 5.960464477539063e-08 - 0.5) * 1.5707963267948966
    q = t * t
    sine = ((((q * (1 / 362880) + (-1 / 5040)) * q + (1 / 120)) * q + (-1 / 6)) * q + 1.0) * t
    cosine = ((((q * (-1 / 3628800) + (1 / 40320)) * q + (-1 / 720)) * q + (1 / 24)) * q + (-1 / 2)) * q + 1.0
    odd = (quadrant & 1) == 1
    x = _flip(tl.where(odd, sine, cosine), (quadrant ^ (quadrant >> 1)) & 1)
    y = _flip(tl.where(odd, cosine, sine), quadrant >> 1)
    return radius * x, radius * y


@triton.jit(do_not_specialize=SCALARS)
def _gaussian_rebuild(
    out, base, seeds, factors, count, n, key0, key1, word2, word3, start, SIZE: tl.constexpr
):  # fmt: skip
    low = tl.program_id(0).to(tl.int64) * SIZE
    position = (start + low) // 4 + tl.arange(0, SIZE // 4)
    a = tl.zeros((SIZE // 4,), tl.float32)
    b, c, d = a, a, a
    for i in range(count):
        factor = tl.load(factors + i)
        x0, x1, x2, x3 = _words(position, tl.load(seeds + i), word2, word3, key0, key1)
        z0, z1 = _normals(x0, x1)
        z2, z3 = _normals(x2, x3)
        a, b, c, d = a + z0 * factor, b + z1 * factor, c + z2 * factor, d + z3 * factor
    total = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (SIZE,))
    at = low + tl.arange(0, SIZE)
    _store(out + at, tl.load(base + at, mask=at < n).to(tl.float32) + total, at < n)
