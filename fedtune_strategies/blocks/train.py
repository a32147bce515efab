"""Local training of one block: AdamW on a float32 copy, with backward stopping at the block.

The source is BAdam (arXiv 2404.02827) as FedCyBGD (arXiv 2406.11187) uses it: fresh moments for every turn, gradients
and optimiser state for the active block only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.find import Block

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class BlockUpdate:
    """What a turn of local training produced.

    Attributes
    ----------
    delta : dict of str to Tensor
        new − old for every tensor of the block, float32.
    losses : list of float
        Loss of every step taken, in order, before that step.
    steps : int
        Steps taken.
    skipped : int
        Steps left out because their loss or gradient was not finite.
    grad_norm : float
        Mean over the steps taken of the 2-norm of the block's gradient; NaN if none was taken.
    """

    delta: dict[str, Tensor]
    losses: list[float]
    steps: int
    skipped: int
    grad_norm: float


def train_block(
    model: nn.Module,
    block: Block,
    loss_fn: LossFn,
    batches: Sequence[Any],
    steps: int,
    lr: float | Callable[[int], float],
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    start: Mapping[str, Tensor] | None = None,
    accumulate: int = 1,
) -> BlockUpdate:
    """Take AdamW steps on one block, leaving the model as it was.

    The model is in evaluation mode during training (no dropout), everything outside the block has
    ``requires_grad = False``, and the block itself is trained in float32 whatever the model's dtype. On return, or on
    an error, every weight and flag of the model is what it was before: to commit the result, whoever holds the weights
    calls `apply_delta` with the delta *as it travelled*, and so all holders have the same bits.

    Parameters
    ----------
    model : nn.Module
        The model; any float dtype.
    block : Block
        The block to train.
    loss_fn : callable
        ``loss_fn(model, batch)`` gives the scalar loss of one batch.
    batches : sequence
        Batches of the node's data; step s takes ``accumulate`` consecutive ones, starting over at the end.
    steps : int
        Steps K, the skipped ones included.
    lr : float or callable
        Learning rate, or a function of the local step (from 0), by which a schedule over all turns is given.
    weight_decay, betas : float, (float, float)
        Of AdamW (decoupled decay).
    start : mapping of str to Tensor, optional
        The exact float32 block to start from where the model holds it in 16 bits; by default the model's own.
    accumulate : int
        Batches whose mean gradient makes one step.

    Returns
    -------
    BlockUpdate
        The change of the block and how it came about.
    """
    parameters = {name: model.get_parameter(name) for name in block.parameters}
    start = {name: (start or parameters)[name].detach().to(p.device, torch.float32) for name, p in parameters.items()}
    losses: list[float] = []
    norms: list[float] = []
    with _only_trainable(model, parameters.values()), _restored(parameters.values()):
        master = [value.clone() for value in start.values()]
        optimizer = torch.optim.AdamW(master, lr=0.0, betas=betas, weight_decay=weight_decay)
        _write(parameters.values(), master)
        for step in range(steps):
            turn_batches = [batches[(step * accumulate + i) % len(batches)] for i in range(accumulate)]
            loss = _accumulate_gradients(model, loss_fn, turn_batches)
            norm = _take_gradients(parameters.values(), master) if math.isfinite(loss) else math.nan
            for parameter in parameters.values():
                parameter.grad = None
            if not math.isfinite(norm):
                continue
            optimizer.param_groups[0]["lr"] = lr(step) if callable(lr) else lr
            optimizer.step()
            _write(parameters.values(), master)
            losses.append(loss)
            norms.append(norm)
    delta = {name: new.sub_(old) for (name, old), new in zip(start.items(), master, strict=True)}
    grad_norm = sum(norms) / len(norms) if norms else math.nan
    return BlockUpdate(delta, losses, len(losses), steps - len(losses), grad_norm)


def apply_delta(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor], gamma: float = 1.0) -> dict[str, Tensor]:
    """Commit a turn: W + γ·ΔW in float32, the same bits on every holder.

    The product and the sum are two operations, each rounded once (IEEE 754): a fused multiply-add, which some
    processors would use and others not, cannot come between them.

    Parameters
    ----------
    weights : mapping of str to Tensor
        The block at the version that the delta starts from.
    delta : mapping of str to Tensor
        As decoded from the wire, by name.
    gamma : float
        Server step size γ.

    Returns
    -------
    dict of str to Tensor
        The new block, float32.
    """
    return {name: value.float() + delta[name].float() * gamma for name, value in weights.items()}


def _accumulate_gradients(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    """Add the mean gradient of the batches to ``.grad``; return the mean loss, not finite as soon as one is not."""
    total = 0.0
    for batch in batches:
        loss = loss_fn(model, batch) / len(batches)
        total += loss.item()
        if not math.isfinite(total):
            break
        loss.backward()
    return total


def _take_gradients(parameters: Iterable[nn.Parameter], master: Sequence[Tensor]) -> float:
    """Give the gradients to the float32 copies; return their 2-norm."""
    for parameter, copy in zip(parameters, master, strict=True):
        copy.grad = torch.zeros_like(copy) if parameter.grad is None else parameter.grad.float()
    return torch.stack([copy.grad.norm() for copy in master if copy.grad is not None]).norm().item()


def _write(parameters: Iterable[nn.Parameter], master: Sequence[Tensor]) -> None:
    """Let the model see the float32 copies: themselves where it is in float32, rounded where not."""
    for parameter, copy in zip(parameters, master, strict=True):
        parameter.data = copy.to(parameter.dtype)


@contextlib.contextmanager
def _only_trainable(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, with gradients for `trained` alone; restores both."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Start without gradients; afterwards put the block's tensors and gradients back."""
    before = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, data, grad in before:
            parameter.data, parameter.grad = data, grad
