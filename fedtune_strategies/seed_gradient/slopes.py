"""The slopes of a loss along all K directions, ``g = sum_t Z_t^T dL/dW_t``, without ever holding the model's gradient.

Backward hands over one tensor's gradient at a time. Each is projected onto the directions as soon as it is there, and
dropped; that of a large matrix is never whole, it is computed and projected some rows at a time. Decoder layers are
checkpointed. So a step needs the memory of inference and the activations of one layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.gradients import only_trainable
from fedtune_strategies.blocks.layers import checkpointed
from fedtune_strategies.layer_weights import layer_weights
from fedtune_strategies.seed_gradient.rows import projected_by_rows
from fedtune_strategies.seed_space import Pool

HALF_SCALE = 2.0**12  # float16 ends at 6e-8: losses are scaled by this before backward


class Slopes(NamedTuple):
    """A loss and its slopes, float64 [K] on the CPU; where the loss is not finite, they mean nothing."""

    loss: float
    g: Tensor


def slopes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    pool: Pool,
    *,
    checkpoint: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> Slopes:
    """Find the slopes of one batch's loss along all directions, by one backward pass.

    The model is in evaluation mode (no dropout) meanwhile. Projections are float32 with float64 sums, whatever the type
    of the weights. Where they are float16, the loss is scaled, and less so until the slopes are finite. With
    `checkpoint`, activations of decoder layers are computed again in backward: same bits, a third more time. `weights`
    gives all of the model's weights as their layers run, which then are checkpointed; the model need hold none.
    """
    scale = HALF_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
    while True:
        found = _scaled_slopes(model, parameters, loss, batch, pool, checkpoint, weights, scale)
        if scale <= 1.0 or not math.isfinite(found.loss) or bool(found.g.isfinite().all()):
            return found
        scale /= 2


def _scaled_slopes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    pool: Pool,
    checkpoint: bool,
    weights: Mapping[str, Tensor] | None,
    scale: float,
) -> Slopes:
    total = torch.zeros(pool.size, dtype=torch.float64)

    def add(slopes: Tensor) -> None:
        total.add_(slopes.cpu(), alpha=1 / scale)

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_trainable(model, parameters.values()))
        stack.enter_context(projected_by_rows(model, parameters, pool, add))
        if weights is None:
            stack.enter_context(_projected_when_there(parameters, pool, add))
        else:
            stack.enter_context(_made_when_used(model, parameters, pool, add, weights))
        if checkpoint:
            stack.enter_context(checkpointed(model, first=0))
        value = loss(model, batch)
        if torch.isfinite(value):
            (value.float() * scale).backward()
    return Slopes(float(value.detach()), total)


@contextlib.contextmanager
def _projected_when_there(
    parameters: Mapping[str, nn.Parameter], pool: Pool, add: Callable[[Tensor], None]
) -> Iterator[None]:
    """Project the gradient of each parameter as soon as backward has it whole, and drop it."""

    def take(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            add(pool.project(name, parameter.grad))
            parameter.grad = None

    with contextlib.ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(take, name)).remove)
        yield


@contextlib.contextmanager
def _made_when_used(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    pool: Pool,
    add: Callable[[Tensor], None],
    weights: Mapping[str, Tensor],
) -> Iterator[None]:
    """Give each layer its weights while it runs; backward hands their gradients straight to the projection."""
    anchor = torch.zeros((), requires_grad=True)

    @contextlib.contextmanager
    def made(stored: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        with torch.no_grad():
            values = {name: weights[name].to(own.device) for name, own in stored.items()}
        yield {
            name: _Weight.apply(anchor, value, lambda g, name=name: add(pool.project(name, g)))
            if name in parameters
            else value
            for name, value in values.items()
        }

    with layer_weights(model, weights, made):
        yield


class _Weight(torch.autograd.Function):
    """A weight that autograd does not keep: a leaf would hold it from forward to backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, project: Callable[[Tensor], None]) -> Tensor:
        ctx.project = project
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        if gradients[0] is not None:
            ctx.project(gradients[0])
        return None, None, None
