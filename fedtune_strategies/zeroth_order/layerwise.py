"""A model at another point of seed space, its weights untouched: one layer at a time, inside the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedtune_strategies.layer_weights import layer_weights
from fedtune_strategies.seed_space import Pool, tuned_parameters


@contextmanager
def at_point(
    model: nn.Module, pool: Pool, theta: Tensor, pattern: str | None = None, base: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Let a model compute with ``W + sum_k theta_k z_k`` while its stored weights W stay as they are.

    The tuned parameters of a decoder layer are rebuilt into a scratch buffer before it runs, and put back afterwards.
    So nothing erodes, memory grows by one layer, and weights that `accelerate` keeps on another device, in main memory
    or on disk are rebuilt where and when they are loaded. Theta is read by every forward pass: it may be changed in
    between. `base` gives W of all parameters as their layers run; the model then need hold none. No gradients within.
    """
    scratch, tuned = _Scratch(), tuned_parameters(model, pattern)

    def place(name: str, own: Tensor, out: Tensor) -> Tensor:
        weight = own if base is None else base[name].to(own.device)
        return pool.rebuild(name, weight, theta, out=out) if name in tuned else out.copy_(weight)

    @contextmanager
    def rebuilt(stored: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        mark = scratch.used
        try:
            yield {name: place(name, own, scratch.take(own)) for name, own in stored.items()}
        finally:
            scratch.used = mark

    with layer_weights(model, tuned if base is None else base, rebuilt):
        yield


class _Scratch:
    """One reused buffer per device; a module that runs inside another takes what is behind the other's part."""

    def __init__(self) -> None:
        self.buffers: dict[torch.device, Tensor] = {}
        self.used = 0

    def take(self, like: Tensor) -> Tensor:
        start, self.used = self.used, self.used + -(-like.nbytes // 64) * 64
        buffer = self.buffers.get(like.device)
        if buffer is None or len(buffer) < self.used:
            buffer = self.buffers[like.device] = torch.empty(self.used, dtype=torch.uint8, device=like.device)
        return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
