"""Gradients of one block, with the rest of the model frozen and backward stopping at the block."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.find import Block, decoder_layers
from fedtune_strategies.blocks.layers import PrefixCache, checkpointed

log = logging.getLogger("fedtune")

LossFn = Callable[[nn.Module, Any], Tensor]


class BlockGradient(NamedTuple):
    """Mean gradient of a block over some batches."""

    loss: float  # mean loss; not finite if the loss of any batch was not, and then `tensors` means nothing
    tensors: list[Tensor]  # float32, in the order of the block's parameters
    norm: float  # 2-norm of all of them; not finite if the loss or any element is not


@contextlib.contextmanager
def block_gradients(
    model: nn.Module,
    block: Block,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    autocast: torch.dtype | None = None,
    checkpoint: bool = False,
    cache_bytes: int = 0,
) -> Iterator[Callable[[Iterable[int]], BlockGradient]]:
    """Yield ``gradient(indices)``: the mean gradient of one block over the batches at these indices.

    The model is in evaluation mode, everything else frozen; restored at the end. `autocast` is the 16-bit type of
    matrix products, the model's own by default. Where float16 is computed in, losses are scaled; while the scale is too
    large, it is halved and the gradient computed again. With `checkpoint`, activations from the block upwards are
    computed again in backward: same bits. `cache_bytes` bounds the memory for hidden states of the frozen layers below
    the block, computed once for each batch: same bits. Two more losses of the first batch show beforehand that it is
    so; else nothing is kept.
    """
    parameters = [model.get_parameter(name) for name in block.parameters]
    below = _layers_below(model, block)
    cache = PrefixCache(cache_bytes)
    scale = 2.0**16 if torch.float16 in (autocast, *(p.dtype for p in model.parameters())) else 1.0

    def loss_of(index: int) -> Tensor:
        cache.begin(index)
        with torch.autocast(parameters[0].device.type, autocast, enabled=autocast is not None):
            return loss_fn(model, batches[index])

    def scaled(chosen: Sequence[int]) -> BlockGradient:
        total = 0.0
        for index in chosen:
            loss = loss_of(index)
            total += loss.item() / len(chosen)
            if not math.isfinite(total):
                break
            if loss.requires_grad:  # not so where the loss does not depend on the block
                (loss.float() * (scale / len(chosen))).backward()
        tensors = [_taken(parameter, scale) for parameter in parameters]
        if not math.isfinite(total):
            return BlockGradient(total, tensors, math.nan)
        return BlockGradient(total, tensors, torch.stack([tensor.norm() for tensor in tensors]).norm().item())

    def gradient(indices: Iterable[int]) -> BlockGradient:
        nonlocal scale
        chosen = list(indices)
        found = scaled(chosen)
        while scale > 1.0 and math.isfinite(found.loss) and not math.isfinite(found.norm):
            scale /= 2
            found = scaled(chosen)
        return found

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_trainable(model, parameters))
        if cache_bytes and batches and below:
            if cache.check(below, parameters, lambda: loss_of(0)):
                stack.enter_context(cache.installed(below))
            else:
                log.info("%s gives another loss with cached layers: they run every time.", type(model).__name__)
        if checkpoint:
            stack.enter_context(checkpointed(model, first=len(below)))
        yield gradient


def _taken(parameter: nn.Parameter, scale: float) -> Tensor:
    """Take the gradient out of a parameter, in float32; zero for one that the loss does not depend on."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return gradient.float() if scale == 1.0 else gradient.float() / scale


def _layers_below(model: nn.Module, block: Block) -> list[nn.Module]:
    """Decoder layers that run before the block."""
    _, layers = decoder_layers(model)
    if block.layer is not None:
        return list(layers)[: block.layer]
    return [] if block.kind == "embedding" else list(layers)


@contextlib.contextmanager
def only_trainable(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, no gradients but those to come of `trained`; restores modes, flags and gradients."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for parameter in trained:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
