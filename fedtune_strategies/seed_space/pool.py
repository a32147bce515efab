"""Seed pools: K fixed directions in parameter space, and what is done with them.

A direction z_k is a function of (pool key, k, parameter name, element number) and of nothing else: not of the device,
the dtype, the thread count, the shard or the order of tensors. Mathematics: docs/seed-space.md.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

import torch
from torch import Tensor

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.seed_space.kernels import kernels, spread, thread_count
from fedtune_strategies.seed_space.philox import BITS
from fedtune_strategies.seed_space.reference import Moves

CHUNK = 1 << 15  # elements of 16-bit weights that are held in float32 at once
ROWS = 16  # rows of a walsh pool that share a transform, where nothing else is said
SHARE = 1 << 18  # elements that are worth a thread
PART = 1 << 20  # elements that are projected at once: the same for any number of threads, since sums depend on it


@dataclass(frozen=True)
class Pool(ABC):
    """K = `size` directions, drawn with a 64-bit key; `make_pool` makes one.

    Weights may be float32, bfloat16 or float16; theta is float32 [K]. Names are canonical (`tuned_parameters`). `out`
    is where to write, `weight` or `base` itself for in place, a new tensor by default. What does not fit is a
    ConfigError.
    """

    key: int
    size: int

    @property
    def _chunk(self) -> int:
        return CHUNK

    @property
    def _row(self) -> int:
        """Elements that a kernel's run begins at a multiple of."""
        return BITS

    @property
    def _part(self) -> int:
        return PART

    @abstractmethod
    def _move(self, name: str, out: Tensor, weight: Tensor, moves: Moves, start: int) -> None: ...

    @abstractmethod
    def _rebuild(self, name: str, out: Tensor, base: Tensor, theta: Tensor, start: int) -> None: ...

    @abstractmethod
    def project_part(self, name: str, delta: Tensor, start: int) -> Tensor:
        """Project the elements of one parameter from `start` on, float32 [n]: slopes, float32 [K or more]."""

    def direction(
        self, name: str, shape: tuple[int, ...] | torch.Size, k: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """z_k for one parameter of this shape, float32."""
        return self.perturb(name, torch.zeros(shape, device=device), k, 1.0)

    def perturb(self, name: str, weight: Tensor, k: int, c: float, out: Tensor | None = None) -> Tensor:
        """``weight + c * z_k``, computed in float32 and rounded once."""
        return self.move(name, weight, [(k, c)], out)

    def move(self, name: str, weight: Tensor, moves: Moves, out: Tensor | None = None) -> Tensor:
        """``weight + c_1 * z_{k_1} + c_2 * z_{k_2} + …``: float32 sums in that order, in one pass, rounded once."""
        for k, _ in moves:
            if not 0 <= k < self.size:
                raise ConfigError(f"seed {k} is not in a pool of {self.size}: seeds are 0 to {self.size - 1}")

        def kernel(result: Tensor, source: Tensor, start: int) -> None:
            if result.dtype == torch.float32 or len(moves) == 1:
                self._move(name, result, source, moves, start)
            else:  # several passes over 16 bits would round several times
                wide = source.to(torch.float32)
                self._move(name, wide, wide, moves, start)
                result.copy_(wide)

        return _sweep(kernel, weight, out, self._chunk)

    def rebuild(self, name: str, base: Tensor, theta: Tensor, out: Tensor | None = None) -> Tensor:
        """``base + sum_k theta_k * z_k``: float32 sums, rounded once to the dtype of `out`."""
        point = self._point(theta, base.device)

        def kernel(result: Tensor, source: Tensor, start: int) -> None:
            self._rebuild(name, result, source, point, start)

        return _sweep(kernel, base, out, self._chunk)

    def rebuild_model(self, parameters: Mapping[str, Tensor], base: Mapping[str, Tensor], theta: Tensor) -> None:
        """Set every parameter to its value at theta, in place; `base` may be a lazy mapping over files."""
        for name, parameter in parameters.items():
            self.rebuild(name, base[name].to(parameter.device), theta, out=parameter.detach())

    def project(
        self, name: str, delta: Tensor, *, start: int = 0, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """Inner products ``scale * <delta, z_k>`` for all k, float64 [K]: the transpose of `rebuild`.

        Float32 sums over fixed parts of the tensor, added to `out` (float32 or float64) in the order of the parts. So a
        kind of device always gives the same bits, with any number of threads; kinds differ by rounding, and so do other
        slices. `delta` may be a run of the flattened tensor, from its element number `start` on.
        """
        flat = delta.detach().reshape(-1)
        if out is None:
            out = torch.zeros(self.size, dtype=torch.float64, device=flat.device)
        if out.shape != (self.size,):
            raise ConfigError(f"the sums have shape {tuple(out.shape)}, and the pool needs ({self.size},)")
        lead = start % self._row  # kernels begin with a whole row
        low, stop = start - lead, start + len(flat)
        cuts = [low, *range((low // self._part + 1) * self._part, stop, self._part), stop]
        parts = list(enumerate(itertools.pairwise(cuts)))
        order = _Order()

        def run(part: tuple[int, tuple[int, int]]) -> None:
            number, (low, high) = part
            found = None
            try:
                values = flat[max(low - start, 0) : high - start].to(torch.float32)
                if low < start:
                    values = torch.nn.functional.pad(values, (lead, 0))
                found = self.project_part(name, values, low)[: self.size]
            finally:  # a part that fails must not hold up the others
                with order.turn(number):
                    if found is not None:
                        out.add_(found, alpha=scale)

        spread(run, parts, flat.device)
        return out

    def _point(self, theta: Tensor, device: torch.device) -> Tensor:
        if theta.shape != (self.size,):
            raise ConfigError(f"theta has shape {tuple(theta.shape)}, and the pool needs ({self.size},)")
        return theta.detach().to(device=device, dtype=torch.float32)


@dataclass(frozen=True)
class WalshPool(Pool):
    """Random signs times Walsh functions: all K directions in log2 K additions per parameter.

    ``z_k[e] = D[e] * E[b, k] * (-1)**popcount(j & k)`` for element e of the flattened tensor, with ``j = e mod C``,
    block ``b = e // B``, C the smallest power of two that holds K, B = `block`, C times a power of two, and D, E
    independent random signs.
    """

    block: int

    @property
    def columns(self) -> int:
        """Transform size C."""
        return 1 << (self.size - 1).bit_length()

    @property
    def _chunk(self) -> int:
        return max(CHUNK, self.columns)

    @property
    def _row(self) -> int:
        return max(BITS, self.columns)

    @property
    def _part(self) -> int:
        return max(PART, min(self.block, 8 * self.columns))

    def _move(self, name: str, out: Tensor, weight: Tensor, moves: Moves, start: int) -> None:
        kernels(out.device).walsh_add(out, weight, moves, self.key, name, self.columns, self.block, start)

    def _rebuild(self, name: str, out: Tensor, base: Tensor, theta: Tensor, start: int) -> None:
        kernels(out.device).walsh_rebuild(out, base, theta, self.key, name, self.columns, self.block, start)

    def project_part(self, name: str, delta: Tensor, start: int) -> Tensor:
        """See `Pool.project_part`."""
        return kernels(delta.device).walsh_project(delta, self.key, name, self.columns, self.block, start)

    def _point(self, theta: Tensor, device: torch.device) -> Tensor:
        point = super()._point(theta, device)
        return torch.nn.functional.pad(point, (0, self.columns - self.size))


@dataclass(frozen=True)
class GaussianPool(Pool):
    """Independent standard normal directions, as in the FedKSeed paper (arXiv 2312.06353). Rebuilding costs O(K)."""

    def _move(self, name: str, out: Tensor, weight: Tensor, moves: Moves, start: int) -> None:
        for k, c in moves:
            seed, factor = torch.tensor([k]), torch.tensor([c], dtype=torch.float32, device=out.device)
            kernels(out.device).gaussian_rebuild(out, weight, seed, factor, self.key, name, start)
            weight = out

    def _rebuild(self, name: str, out: Tensor, base: Tensor, theta: Tensor, start: int) -> None:
        seeds = torch.nonzero(theta).flatten()
        kernels(out.device).gaussian_rebuild(out, base, seeds, theta[seeds], self.key, name, start)

    def project_part(self, name: str, delta: Tensor, start: int) -> Tensor:
        """See `Pool.project_part`."""
        return kernels(delta.device).gaussian_project(delta, self.size, self.key, name, start)


def make_pool(kind: str, key: int, size: int, transform: int | None = None) -> Pool:
    """Make a pool of `size` directions, "walsh" or "gaussian"; the key's low 64 bits count.

    `transform` is a walsh pool's B, a power of two not below K. By default it is 16 times the smallest: half as dear to
    rebuild (docs/seed-space.md).
    """
    key &= (1 << 64) - 1
    if not 1 <= size <= 1 << 32:
        raise ConfigError(f"a pool has 1 to 4294967296 seeds, not {size}: change its size")
    if kind == "gaussian":
        return GaussianPool(key, size)
    if kind != "walsh":
        raise ConfigError(f'unknown kind of pool "{kind}": choose walsh or gaussian')
    block = transform or ROWS << (size - 1).bit_length()
    if block < size or block & (block - 1):
        raise ConfigError(
            f"a walsh pool of {size} seeds needs a transform that is a power of two ≥ {size}, not {block}"
        )
    return WalshPool(key, size, block)


def _sweep(kernel: Callable[[Tensor, Tensor, int], None], source: Tensor, out: Tensor | None, chunk: int) -> Tensor:
    """Apply a flat kernel to a tensor of any dtype, over all threads that torch may use; round once at the end."""
    source = source.detach()
    out = torch.empty_like(source, memory_format=torch.contiguous_format) if out is None else out
    if not out.is_contiguous():
        # In the output's own dtype, or it would be rounded twice.
        return out.copy_(_sweep(kernel, source, torch.empty_like(out, memory_format=torch.contiguous_format), chunk))
    flat, result = source.reshape(-1), out.detach().view(-1)
    if source.data_ptr() == out.data_ptr():
        flat = result
    direct = {flat.dtype, result.dtype} <= kernels(flat.device).DTYPES

    def run(low: int, high: int) -> None:
        if direct:
            target = result[low:high]
            kernel(target, target if flat is result else flat[low:high], low)
            return
        for start in range(low, high, chunk):  # what kernels do not take: through a small scratch in float32
            stop = min(start + chunk, high)
            scratch = flat[start:stop].to(torch.float32, copy=True)  # the kernel works in place
            kernel(scratch, scratch, start)
            result[start:stop] = scratch

    n = len(flat)
    threads = max(1, min(thread_count(flat.device), -(-n // SHARE)))
    share = max(1, -(-n // (threads * chunk))) * chunk
    spread(lambda low: run(low, min(low + share, n)), range(0, n, share), flat.device)
    return out


class _Order:
    """Turns of threads, in the order of numbers from 0 on."""

    def __init__(self) -> None:
        self._next, self._changed = 0, Condition()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._next == number)
        try:
            yield
        finally:
            with self._changed:
                self._next += 1
                self._changed.notify_all()
