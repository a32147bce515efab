"""The loops of the CPU kernels, compiled by numba; `cpu` calls them with tensors.

They release the interpreter lock, so that a tensor may be split over threads. None that rebuilds sums across its run,
and none lets a multiplication and an addition fuse: neither thread count nor vector width nor processor reaches the
bits. Loops are written so that LLVM turns them into vector instructions: no branches, no wrap-around indices, no calls,
32 signs to a word. All are in this one file, since numba's disk cache notices changes of a function's own file alone.
"""

# mypy: disable-error-code="no-untyped-def, call-arg"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fedtune_strategies.seed_space.philox import BITS, MULTIPLIERS, WEYL
from fedtune_strategies.seed_space.reference import GOLDEN

CACHED = 16384  # elements of a transform that is done in the cache; longer ones take two stages
STRIP = 256  # columns of the second stage
TILE = 2048  # elements that are worked on at once: fits the first-level cache
M0, M1 = map(np.uint64, MULTIPLIERS)
W0, W1 = map(np.uint32, WEYL)
HIGH, LOW, G = np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64(GOLDEN)
PLACES = np.array([0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xFF00FF00, 0xFFFF0000], np.uint32)  # bit by bit of 0 … 31
I32, U32, F32 = np.int32, np.uint32, np.float32
ONE, TWO, HALF, UNIT = F32(1), F32(2), F32(0.5), F32(2.0**-24)
LOG2, QUARTER_TURN = F32(math.log(2.0)), F32(math.pi / 2)
L9, L7, L5, L3 = F32(2 / 9), F32(2 / 7), F32(2 / 5), F32(2 / 3)
S9, S7, S5, S3 = F32(1 / 362880), F32(-1 / 5040), F32(1 / 120), F32(-1 / 6)
C10, C8, C6, C4, C2 = F32(-1 / 3628800), F32(1 / 40320), F32(-1 / 720), F32(1 / 24), F32(-1 / 2)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at first call; keep the machine code on disk where a cache folder is writable."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile into each caller: LLVM turns no loop into vector instructions that calls a function."""
    return numba.njit(error_model="numpy", forceinline=True)(function)


@intrinsic
def _as_float(context, bits):
    """Reinterpret 32 bits as a float32."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _as_bits(context, value):
    """Reinterpret a float32 as 32 bits."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic
def _wide(context, stored):
    """A stored number as float32: itself, or the 16 bits of a bfloat16."""
    if stored == types.float32:
        return types.float32(stored), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        high = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _narrow(context, value, like):
    """A float32 as it is stored beside `like`: itself, or the 16 bits of the nearest bfloat16, ties to even."""
    if like == types.float32:
        return types.float32(types.float32, like), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(args[0], word)
        high = builder.lshr(bits, ir.Constant(word, 16))
        odd = builder.and_(high, ir.Constant(word, 1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF))), ir.Constant(word, 16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])  # whose bits could be rounded into a number's
        return builder.trunc(builder.select(is_nan, ir.Constant(word, 0x7FC0), nearest), half)

    return types.uint16(types.float32, types.uint16), codegen


@_inline
def _round(x0, x1, x2, x3, key0, key1):
    product0, product1 = M0 * np.uint64(x0), M1 * np.uint64(x2)
    high0, high1 = U32(product0 >> HIGH), U32(product1 >> HIGH)
    return U32(high1 ^ x1 ^ key0), U32(product1), U32(high0 ^ x3 ^ key1), U32(product0)


@_inline
def _philox(x0, x1, x2, x3, key0, key1):
    # Written out: LLVM turns a loop over counters into vector instructions only if it contains no other loop.
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(0) * W0), U32(key1 + U32(0) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(1) * W0), U32(key1 + U32(1) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(2) * W0), U32(key1 + U32(2) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(3) * W0), U32(key1 + U32(3) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(4) * W0), U32(key1 + U32(4) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(5) * W0), U32(key1 + U32(5) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(6) * W0), U32(key1 + U32(6) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(7) * W0), U32(key1 + U32(7) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(8) * W0), U32(key1 + U32(8) * W1))
    x0, x1, x2, x3 = _round(x0, x1, x2, x3, U32(key0 + U32(9) * W0), U32(key1 + U32(9) * W1))
    return x0, x1, x2, x3


@_compile
def _random_words(words, first, keys, stream):
    """Fill `words` with the random bits of counters `first`, `first + 1`, …, four words each."""
    key0, key1, word2, word3 = keys[0], keys[1], stream[0], stream[1]
    low = U32(first)
    for i in range(len(words) // 4):
        x0, x1, x2, x3 = _philox(U32(low + U32(i)), U32(0), word2, word3, key0, key1)
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = x0, x1, x2, x3


@_compile
def _random_bit(number, keys, stream):
    """One random bit, by its number: 0 or 1."""
    words = _philox(U32(number >> 7), U32(0), stream[0], stream[1], keys[0], keys[1])
    return (words[(number >> 5) & 3] >> U32(number & 31)) & U32(1)


@_compile
def _copy(out, x):
    for i in range(len(x)):
        out[i] = _narrow(_wide(x[i]), out[i])


@_compile
def _add_signed(out, base, x, words):
    """``out[i] = base[i] - x[i]`` where bit i is set, else ``base[i] + x[i]``."""
    n = len(out)
    for w in range(n // 32):
        word = words[w]
        for i in range(32 * w, 32 * w + 32):
            out[i] = _narrow(_wide(base[i]) + (-x[i] if (word >> U32(i & 31)) & U32(1) else x[i]), out[i])
    for i in range(n // 32 * 32, n):
        out[i] = _narrow(_wide(base[i]) + (-x[i] if (words[i >> 5] >> U32(i & 31)) & U32(1) else x[i]), out[i])


@_compile
def _add_signed_in_place(out, x, words):
    """As `_add_signed` with ``base = out``: LLVM makes no vector instructions of two names for one memory."""
    n = len(out)
    for w in range(n // 32):
        word = words[w]
        for i in range(32 * w, 32 * w + 32):
            out[i] = _narrow(_wide(out[i]) + (-x[i] if (word >> U32(i & 31)) & U32(1) else x[i]), out[i])
    for i in range(n // 32 * 32, n):
        out[i] = _narrow(_wide(out[i]) + (-x[i] if (words[i >> 5] >> U32(i & 31)) & U32(1) else x[i]), out[i])


@_compile
def _add_constant(x, c, words):
    """Add -c to ``x[i]`` where bit i is set, else c."""
    n = len(x)
    for w in range(n // 32):
        word = words[w]
        for i in range(32 * w, 32 * w + 32):
            x[i] += -c if (word >> U32(i & 31)) & U32(1) else c
    for i in range(n // 32 * 32, n):
        x[i] += -c if (words[i >> 5] >> U32(i & 31)) & U32(1) else c


@_compile
def _flip(out, x, words):
    """``out[i] = -x[i]`` where bit i is set, else ``x[i]``."""
    n = len(x)
    for w in range(n // 32):
        word = words[w]
        for i in range(32 * w, 32 * w + 32):
            out[i] = -x[i] if (word >> U32(i & 31)) & U32(1) else x[i]


@_compile
def _fwht(x, y):
    """Walsh-Hadamard transform of x; the result is in the returned one of the two buffers."""
    n = len(x)
    if n <= CACHED:
        return _fwht_cached(x, y)
    for low in range(0, n, CACHED):  # the low index bits, part by part in the cache, then the high ones
        part, spare = x[low : low + CACHED], y[low : low + CACHED]
        _copy(spare, _fwht_cached(part, spare))
    for low in range(0, CACHED, STRIP):
        stride = 1
        while stride < n // CACHED:
            _across(y, low, stride)
            stride *= 2
    return y


@_compile
def _across(x, low, stride):
    """Butterflies of rows `stride` apart, each of CACHED columns, in the columns from `low` on."""
    rows = len(x) // CACHED
    for first in range(0, rows, 2 * stride):
        for row in range(first, first + stride):
            a = row * CACHED + low
            b = a + stride * CACHED
            _butterfly(x[a : a + STRIP], x[b : b + STRIP])


@_compile
def _butterfly(a, b):
    for i in range(len(a)):
        a[i], b[i] = a[i] + b[i], a[i] - b[i]


@_compile
def _fwht_cached(x, y):
    """As `_fwht`, for a transform that fits the first- or second-level cache.

    Each pass takes the two lowest index bits of its input and writes them as the highest of its output, so all
    passes are the same, loads and stores run straight through memory, and the last one ends in natural order.
    """
    n = left = len(x)
    while left >= 4:
        quarter = n // 4
        for i in range(quarter):
            a, b, c, d = x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]
            p, q, r, s = a + b, a - b, c + d, c - d
            y[i], y[i + quarter], y[i + 2 * quarter], y[i + 3 * quarter] = p + r, q + s, p - r, q - s
        x, y = y, x
        left //= 4
    if left == 2:
        half = n // 2
        for i in range(half):
            y[i], y[i + half] = x[2 * i] + x[2 * i + 1], x[2 * i] - x[2 * i + 1]
        x, y = y, x
    return x


@_compile
def _seed_sums(sums, theta, x, y, words, e, keys, seed_signs, block):
    """``sum_k theta_k E_k (-1)**popcount(j & k)`` for the elements from e on; the result is in the returned buffer."""
    columns = len(theta)
    if columns >= BITS:
        _random_words(words, e // block * (columns // BITS), keys, seed_signs)
        _flip(x, theta, words)
        return _fwht(x, y)
    for row in range(0, BITS, columns):  # several short rows to a tile of 128
        for k in range(columns):
            bit = _random_bit((e + row) // block * columns + k, keys, seed_signs)
            x[k] = -theta[k] if bit else theta[k]
        sums[row : row + columns] = _fwht(x[:columns], y[:columns])
    return sums


@_compile
def walsh_rebuild(out, base, in_place, theta, keys, element_signs, seed_signs, block, start):
    """See `reference.walsh_rebuild`."""
    tile = max(len(theta), BITS)
    signs, words = np.empty(tile // 32, U32), np.empty(tile // 32, U32)
    x, y, sums = np.empty(tile, F32), np.empty(tile, F32), np.empty(tile, F32)
    known = -1
    for low in range(0, len(base), tile):
        e, n = start + low, min(tile, len(base) - low)
        if block < tile or e // block != known:
            sums = _seed_sums(sums, theta, x, y, words, e, keys, seed_signs, block)
            known = e // block
        _random_words(signs, e // BITS, keys, element_signs)
        if in_place:
            _add_signed_in_place(out[low : low + n], sums, signs)
        else:
            _add_signed(out[low : low + n], base[low : low + n], sums, signs)


@_compile
def walsh_project(total, sums, spare, words, delta, keys, element_signs, seed_signs, block, start):
    """See `reference.walsh_project`: into `total`; `sums` and `spare` are scratch of its size, `words` one of 32nds."""
    columns, first = len(total), 0
    total[:] = F32(0)
    while first < len(delta):  # rows that share seed signs share the transform
        e = start + first
        n = min(len(delta) - first, block - e % block)
        for low in range(0, columns, CACHED):
            part = sums[low : low + CACHED]  # stays in the cache while all rows are added
            part[:] = F32(0)
            for row in range(low, n, columns):
                x = delta[first + row : first + min(row + len(part), n)]
                used = words[: (len(x) + BITS - 1) // BITS * 4]
                _random_words(used, (e + row) // BITS, keys, element_signs)
                _add_signed_in_place(part[: len(x)], x, used)
        _random_words(words, e // block * (columns // BITS), keys, seed_signs)
        width = columns
        while width // 2 >= max(n, BITS):  # the rest of the only row is 0: the transform repeats
            width //= 2
        found = _fwht(sums[:width], spare[:width])
        for k in range(0, columns, width):
            _add_signed_in_place(total[k : k + width], found, words[k // 32 : (k + width) // 32])
        first += n


@_inline
def _parity(x):
    """Whether the number of set bits is odd, as a word of 32 equal bits."""
    x ^= x >> U32(16)
    x ^= x >> U32(8)
    x ^= x >> U32(4)
    x ^= x >> U32(2)
    x ^= x >> U32(1)
    return U32(0) - (x & U32(1))


@_compile
def _seed_word(e, k, columns, block, keys, seed_signs):
    """Seed signs of 32 neighbours from e on: all alike, unless blocks are shorter than that."""
    word, previous = U32(0), U32(0)
    for i in range(0, 32, min(block, 32)):
        bit = _random_bit((e + i) // block * columns + k, keys, seed_signs)
        word ^= (U32(0) - (bit ^ previous)) << U32(i)
        previous = bit
    return word


@_compile
def _add_column(words, signs, same, low, k):
    """``words = signs ^ same ^ parity(j & k)``, j the number of each word's first element: from `low` on."""
    for w in range(len(words)):  # k < columns: an element's number may stand for its place in the row
        words[w] = signs[w] ^ same ^ _parity(U32(low + U32(w << 5)) & k)


@_compile
def _direction_words(words, signs, e, k, columns, block, keys, seed_signs):
    """Sign bits of z_k from element e on: element signs times seed signs times column k."""
    pattern = U32(0)  # parity(i & k) for the 32 places i of a word
    for bit in range(5):
        pattern ^= PLACES[bit] * (U32(k >> bit) & U32(1))
    low, column = U32(e), U32(k)
    segment = min(len(words), max(1, columns // 32))
    for first in range(0, len(words), segment):
        same = _seed_word(e + 32 * first, k, columns, block, keys, seed_signs) ^ pattern
        _add_column(words[first : first + segment], signs[first : first + segment], same, low + U32(32 * first), column)


@_compile
def walsh_add(out, weight, seeds, factors, keys, element_signs, seed_signs, columns, block, start):
    """See `reference.walsh_add`."""
    signs, words = np.empty(TILE // 32, U32), np.empty(TILE // 32, U32)
    wide = np.empty(TILE, F32)
    for low in range(0, len(weight), TILE):
        x = wide[: min(TILE, len(weight) - low)]
        _copy(x, weight[low : low + TILE])
        _random_words(signs, (start + low) // BITS, keys, element_signs)
        for t in range(len(seeds)):
            _direction_words(words, signs, start + low, seeds[t], columns, block, keys, seed_signs)
            _add_constant(x, factors[t], words)
        _copy(out[low : low + TILE], x)


@_compile
def _normals(x, y, factor, radius_bits, angle_bits):
    """Add `factor` times two standard normals per 64 random bits; the series are those of `reference.normals`."""
    for i in range(len(x)):
        u = F32(I32(((radius_bits[i] >> U32(9)) << U32(1)) | U32(1))) * UNIT
        bits = I32(_as_bits(u) + I32(0x3F800000 - 0x3F3504F3))
        exponent = F32(I32((bits >> I32(23)) - I32(127)))
        m = _as_float(I32((bits & I32(0x7FFFFF)) + I32(0x3F3504F3)))
        s = (m - ONE) / (m + ONE)
        q = s * s
        log_u = ((((L9 * q + L7) * q + L5) * q + L3) * q + TWO) * s + exponent * LOG2
        radius = np.sqrt(-TWO * log_u)

        quadrant = angle_bits[i] >> U32(30)
        rest = (U32(angle_bits[i] << U32(2)) >> U32(9)) << U32(1) | U32(1)
        t = (F32(I32(rest)) * UNIT - HALF) * QUARTER_TURN
        q = t * t
        sine = _as_bits(((((S9 * q + S7) * q + S5) * q + S3) * q + ONE) * t)
        cosine = _as_bits(((((C10 * q + C8) * q + C6) * q + C4) * q + C2) * q + ONE)
        swap = (sine ^ cosine) & -I32(quadrant & U32(1))
        flip_x = I32((quadrant ^ (quadrant >> U32(1))) << U32(31))
        flip_y = I32((quadrant >> U32(1)) << U32(31))
        x[i] += factor * (radius * _as_float(I32(cosine ^ swap ^ flip_x)))
        y[i] += factor * (radius * _as_float(I32(sine ^ swap ^ flip_y)))


@_compile
def _planes(a, b, c, d, first, k, keys, stream):
    """Random bits of counters (`first` + i, k): the first of each one's four words goes to a, the second to b, ...."""
    key0, key1, word2, word3 = keys[0], keys[1], stream[0], stream[1]
    low = U32(first)
    for i in range(len(a)):
        a[i], b[i], c[i], d[i] = _philox(U32(low + U32(i)), k, word2, word3, key0, key1)


@_compile
def gaussian_rebuild(out, base, seeds, factors, keys, stream, start):
    """See `reference.gaussian_rebuild`."""
    quarter = TILE // 4
    a, b, c, d = np.empty(quarter, U32), np.empty(quarter, U32), np.empty(quarter, U32), np.empty(quarter, U32)
    sums = np.empty((4, quarter), F32)
    for low in range(0, len(base), TILE):
        sums[:] = F32(0)
        for t in range(len(seeds)):
            _planes(a, b, c, d, (start + low) // 4, seeds[t], keys, stream)
            _normals(sums[0], sums[1], factors[t], a, b)
            _normals(sums[2], sums[3], factors[t], c, d)
        for i in range(min(TILE, len(base) - low)):
            out[low + i] = _narrow(_wide(base[low + i]) + sums[i & 3, i >> 2], out[low + i])


@_compile
def gaussian_project(total, delta, keys, stream, start):
    """See `reference.gaussian_project`."""
    quarter = TILE // 4
    a, b, c, d = np.empty(quarter, U32), np.empty(quarter, U32), np.empty(quarter, U32), np.empty(quarter, U32)
    z, part, products = np.empty((4, quarter), F32), np.zeros((4, quarter), F32), np.empty(quarter, F32)
    for low in range(0, len(delta), TILE):
        n = min(TILE, len(delta) - low)
        for i in range(TILE):
            part[i & 3, i >> 2] = delta[low + i] if i < n else F32(0)
        for k in range(len(total)):
            z[:] = F32(0)
            _planes(a, b, c, d, (start + low) // 4, U32(k), keys, stream)
            _normals(z[0], z[1], ONE, a, b)
            _normals(z[2], z[3], ONE, c, d)
            for i in range(quarter):
                products[i] = (z[0, i] * part[0, i] + z[1, i] * part[1, i]) + (
                    z[2, i] * part[2, i] + z[3, i] * part[3, i]
                )
            total[k] += _sum(products)


@_compile
def _sum(x):
    """Sum by halves, over x itself: a fixed order that vector instructions can follow."""
    n = len(x)
    while n > 1:
        n //= 2
        for i in range(n):
            x[i] += x[n + i]
    return x[0]


@_compile
def word_sums(words, start):
    """See `reference.word_sums`."""
    first, second = np.uint64(0), np.uint64(0)
    place = (np.uint64(start) + np.uint64(1)) * G
    for i in range(len(words)):
        x = words[i] + place
        place += G
        y = (x & LOW) * (x >> HIGH) ^ (x << HIGH | x >> HIGH)
        first += x
        second += (y & LOW) * (y >> HIGH) ^ x
    return first, second
