"""Large frozen matrices, such as an output embedding, used some rows at a time: whole they are never decoded.

The product is cut the same way however the matrix is held, so that every way of holding it gives the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedtune_strategies.layer_weights import forward_as

LARGE = 8 * 2**20
"""Elements from which on a matrix is used by rows."""
_CHUNK = 2 * 2**20

Rows = Callable[[str, slice | Tensor], Tensor]
"""From a parameter's name and some of its rows to these rows, in the parameter's type."""


def large_modules(model: nn.Module, names: Collection[str]) -> dict[nn.Module, str]:
    """Find the linear and embedding modules with a large frozen weight, each with the weight's canonical name."""
    known = {model.get_parameter(name): name for name in names}
    found = {}
    for module in model.modules():
        # Of these types exactly: a subclass may do more with its weight.
        if type(module) in (nn.Linear, nn.Embedding):
            weight = module.get_parameter("weight")
            if weight in known and weight.numel() >= LARGE:
                found[module] = known[weight]
    return found


@contextlib.contextmanager
def chunked(modules: dict[nn.Module, str], rows: Rows) -> Iterator[None]:
    """Let the modules of `large_modules` use their weight some rows at a time."""
    with contextlib.ExitStack() as stack:
        for module, name in modules.items():
            fetch = partial(rows, name)
            if isinstance(module, nn.Linear):
                function = partial(_linear, fetch=fetch, bias=module.bias, features=module.out_features)
            else:
                function = partial(_lookup, fetch=fetch)
            stack.enter_context(forward_as(module, function))
        yield


def _lookup(ids: Tensor, fetch: Callable[[Tensor], Tensor]) -> Tensor:
    return fetch(ids.flatten()).unflatten(0, ids.shape)


def _linear(inputs: Tensor, fetch: Callable[[slice], Tensor], bias: Tensor | None, features: int) -> Tensor:
    output = _Product.apply(inputs, fetch, features)
    return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    """inputs · Wᵀ, forward and backward over chunks of rows of W."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, fetch: Callable[[slice], Tensor], features: int) -> Tensor:
        ctx.fetch, ctx.shape, ctx.dtype = fetch, inputs.shape, inputs.dtype
        ctx.chunks = _chunks(features, inputs.shape[-1])
        return torch.cat([linear(inputs, fetch(rows)) for rows in ctx.chunks], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        # Chunks are summed in float32: in 16 bits the sum would round once a chunk.
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=gradient.device)
        for rows in ctx.chunks:
            total += gradient[..., rows] @ ctx.fetch(rows).to(gradient.dtype)
        return total.to(ctx.dtype), None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // columns)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
