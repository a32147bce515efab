"""A model at another point of seed space, its weights untouched: one layer at a time, inside the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune_strategies.seed_space import Pool, tuned_parameters
from fedtune_strategies.seed_space.parameters import canonical_names


@contextmanager
def at_point(model: nn.Module, pool: Pool, theta: Tensor, pattern: str | None = None) -> Iterator[None]:
    """Let a model compute with ``W + sum_k theta_k z_k`` while its stored weights W stay as they are.

    Before a module runs, its own tuned parameters are rebuilt into a scratch buffer of the largest module's size, and
    afterwards put back. So nothing erodes, memory grows by one layer, and weights that `accelerate` keeps on another
    device, in main memory or on disk are rebuilt where and when they are loaded.

    Parameters
    ----------
    model : nn.Module
        Any model whose parameters are used by the modules that own them. It may be spread out by
        `accelerate.dispatch_model`.
    pool : Pool
        The seed pool.
    theta : Tensor
        float32, shape (K,). Read anew by every forward pass: it may be changed in between.
    pattern : str, optional
        Which parameters are tuned, as in `tuned_parameters`.

    Yields
    ------
    None
        Within the context forward passes happen at theta. Do not use gradients there.
    """
    scratch = _Scratch()
    wrapped = []
    for module, names in _owners(model, pattern):
        # accelerate keeps a module's own forward here, and calls it between loading and unloading the weights.
        attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"
        wrapped.append((module, attribute, vars(module).get(attribute)))
        setattr(module, attribute, _rebuilding(module, getattr(module, attribute), names, pool, theta, scratch))
    try:
        yield
    finally:
        for module, attribute, original in wrapped:
            if original is None:
                delattr(module, attribute)
            else:
                setattr(module, attribute, original)


def _owners(model: nn.Module, pattern: str | None) -> list[tuple[nn.Module, dict[str, str]]]:
    """Modules that own tuned parameters, each with {attribute: canonical name}; tied weights have several owners."""
    canonical, tuned = canonical_names(model), tuned_parameters(model, pattern)
    found = []
    for prefix, module in model.named_modules():
        names = {name: canonical[f"{prefix}.{name}".lstrip(".")] for name, _ in module.named_parameters(recurse=False)}
        own = {attribute: name for attribute, name in names.items() if name in tuned}
        if own:
            found.append((module, own))
    return found


def _rebuilding(
    module: nn.Module, forward: Callable[..., Any], names: dict[str, str], pool: Pool, theta: Tensor, scratch: _Scratch
) -> Callable[..., Any]:
    @torch.no_grad()
    def rebuilt_forward(*args: Any, **kwargs: Any) -> Any:
        parameters = {attribute: getattr(module, attribute) for attribute in names}
        stored = {attribute: parameter.data for attribute, parameter in parameters.items()}
        mark = scratch.used
        try:
            for attribute, parameter in parameters.items():
                value = scratch.take(stored[attribute])
                parameter.data = pool.rebuild(names[attribute], stored[attribute], theta, out=value)
            return forward(*args, **kwargs)
        finally:
            for attribute, parameter in parameters.items():
                parameter.data = stored[attribute]
            scratch.used = mark

    return rebuilt_forward


class _Scratch:
    """One reused buffer per device; a module that runs inside another takes what lies behind the other's part."""

    def __init__(self) -> None:
        self.buffers: dict[torch.device, Tensor] = {}
        self.used = 0

    def take(self, like: Tensor) -> Tensor:
        start, self.used = self.used, self.used + -(-like.nbytes // 64) * 64
        buffer = self.buffers.get(like.device)
        if buffer is None or len(buffer) < self.used:
            buffer = self.buffers[like.device] = torch.empty(self.used, dtype=torch.uint8, device=like.device)
        return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
