"""Local training of one block: AdamW on a float32 copy.

The source is BAdam (arXiv 2404.02827) as FedCyBGD (arXiv 2406.11187) uses it: fresh moments for every turn, gradients
and optimiser state for the active block only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.codecs import PIECE
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.gradients import LossFn, block_gradients


@dataclass(frozen=True)
class BlockUpdate:
    """What a turn of local training produced."""

    delta: dict[str, Tensor]  # new − old for every tensor of the block, float32, on the CPU: it travels
    losses: list[float]  # loss of every step taken, in order, before that step
    steps: int  # steps taken
    skipped: int  # steps left out because their loss or gradient was not finite
    grad_norm: float  # mean over the steps taken of the 2-norm of the block's gradient; NaN if none was taken


def train_block(
    model: nn.Module,
    block: Block,
    loss_fn: LossFn,
    batches: Sequence[Any],
    steps: int,
    lr: float | Callable[[int], float],
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    start: Mapping[str, Tensor] | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpoint: bool = False,
    cache_bytes: int = 0,
) -> BlockUpdate:
    """Take AdamW steps on one block, leaving the model as it was.

    The model is in evaluation mode during training (no dropout), everything outside the block has ``requires_grad =
    False``, and the block itself is trained in float32 for any dtype of the model. On return, or on an error, every
    weight and flag of the model is what it was before: to commit the result, whoever holds the weights calls
    `apply_delta` with the delta *as it travelled*, and so all holders have the same bits.

    Step s takes `accumulate` consecutive batches, starting over at the end. `lr` may be a function of the step, from 0.
    `start` is the exact float32 block where the model holds it in 16 bits. The others are as in `block_gradients`; the
    cache pays when steps · accumulate > len(batches).

    Memory of the block itself: its start, a float32 copy, one gradient and two moments, 20 bytes a parameter in all.
    """
    parameters = {name: model.get_parameter(name) for name in block.parameters}
    start = {name: (start or parameters)[name].detach().to(p.device, torch.float32) for name, p in parameters.items()}
    master = [value.clone() for value in start.values()]
    stepper = torch.optim.AdamW(master, lr=0.0, betas=(beta1, 0.999), weight_decay=weight_decay)
    losses: list[float] = []
    norms: list[float] = []
    options: dict[str, Any] = {"autocast": autocast, "checkpoint": checkpoint, "cache_bytes": cache_bytes}
    with block_gradients(model, block, loss_fn, batches, **options) as gradient, _shown(master, parameters) as show:
        for step in range(steps):
            found = gradient((step * accumulate + i) % len(batches) for i in range(accumulate))
            if math.isfinite(found.norm):
                _step(stepper, master, found.tensors, lr(step) if callable(lr) else lr)
                show()
                losses.append(found.loss)
                norms.append(found.norm)
            del found  # or its gradient would be held beside the next one
    delta = {name: new.sub_(old).cpu() for (name, old), new in zip(start.items(), master, strict=True)}
    grad_norm = sum(norms) / len(norms) if norms else math.nan
    return BlockUpdate(delta, losses, len(losses), steps - len(losses), grad_norm)


def apply_delta(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor], gamma: float = 1.0) -> dict[str, Tensor]:
    """Commit a turn: W + γ·ΔW in float32, the same bits on every holder.

    The product and the sum are two operations, each rounded once (IEEE 754): a fused multiply-add, which some
    processors would use and others not, cannot come between them.
    """
    return {name: _moved(value, delta[name], gamma) for name, value in weights.items()}


def weighted_mean(blocks: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average the changes that several nodes made to one block (FedBAvg), or several states of a block, in float32.

    Sums are in the order of the sequence, so give it sorted by node.
    """
    shares = [weight / sum(weights) for weight in weights]
    mean = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in blocks[0].items()}
    for block, share in zip(blocks, shares, strict=True):
        mean = apply_delta(mean, block, share)
    return mean


def _moved(weight: Tensor, change: Tensor, gamma: float) -> Tensor:
    moved = change.to(weight.device, torch.float32, copy=True)
    # In pieces, or weights of 16 bits would be there in float32 as well: an embedding may be a third of the model.
    for own, old in zip(moved.view(-1).split(PIECE), weight.reshape(-1).split(PIECE), strict=True):
        own.mul_(gamma).add_(old)
    return moved


def _step(stepper: torch.optim.Optimizer, master: list[Tensor], gradient: list[Tensor], lr: float) -> None:
    for copy, tensor in zip(master, gradient, strict=True):
        copy.grad = tensor
    stepper.param_groups[0]["lr"] = lr
    stepper.step()
    stepper.zero_grad()


@contextlib.contextmanager
def _shown(master: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Let the model see the float32 copies: themselves where it is in float32, rounded where not.

    Yields the function that shows them again after a step; the model's own weights come back at the end.
    """
    before = [parameter.data for parameter in parameters.values()]

    def show() -> None:
        for parameter, copy in zip(parameters.values(), master, strict=True):
            parameter.data = copy.to(parameter.dtype)

    try:
        show()
        yield show
    finally:
        for parameter, data in zip(parameters.values(), before, strict=True):
            parameter.data = data
