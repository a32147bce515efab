"""The loss: mean cross-entropy over response tokens. Training and evaluation use this one definition."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fedtune_strategies.language.examples import IGNORE, Batch

LOGITS = 1 << 20  # logits that are held in float32 at once


def response_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of a batch's response tokens, in nats.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers.
    batch : dict of tensors
        See `fedtune_strategies.language.examples.collate`.

    Returns
    -------
    torch.Tensor
        Scalar, float32, differentiable.
    """
    return token_losses(model, batch).mean()


def loss_in_parts(rows: int) -> Callable[[torch.nn.Module, Batch], torch.Tensor]:
    """Return `response_loss`, computed on so many rows at a time: the same mean in less memory, without a gradient."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return torch.cat([token_losses(model, part) for part in micro_batches(batch, rows)]).mean()

    return loss if rows else response_loss


def micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """Cut a batch into parts of so many rows; 0 leaves it whole."""
    size = rows or len(batch["labels"])
    for first in range(0, len(batch["labels"]), size):
        yield {name: value[first : first + size] for name, value in batch.items()}


def response_tokens(batch: Batch) -> torch.Tensor:
    """Return how many response tokens each row has, int64 [rows]."""
    return (batch["labels"][:, 1:] != IGNORE).sum(dim=1)


def finite_mean(losses: Sequence[float] | NDArray[np.floating]) -> tuple[float, int]:
    """Return the mean of the finite losses, not a number where there is none, and how many there are."""
    values = np.asarray(losses)
    finite = values[np.isfinite(values)]
    return (float(finite.mean()) if finite.size else math.nan), finite.size


def example_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of each example's response tokens, in nats: shape [rows], float32; not for gradients."""
    tokens = response_tokens(batch)
    if not len(tokens):
        return torch.empty(0)
    return torch.stack([part.mean() for part in token_losses(model, batch).split(tokens.tolist())])


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each response token of a batch, in nats: float32 [response tokens], row by row.

    Logits are computed only at positions before a response token of some row, and turned into float32 a few tokens at a
    time, in backward too: with a large vocabulary they outweigh everything else in memory.
    """
    device = next(model.parameters()).device
    targets = batch["labels"][:, 1:].to(device)
    wanted = targets != IGNORE
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    columns = wanted.any(dim=0).nonzero().squeeze(1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    wanted, targets = wanted[:, columns], targets[:, columns]
    rows = wanted.flatten().nonzero().squeeze(1)
    logits, targets = logits.flatten(0, 1), targets.flatten()[rows]
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, rows, targets)
    return _cross_entropy(logits, rows, targets)


def _cross_entropy(logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of some rows of logits, shape [rows]: float32, a few rows at a time."""
    parts = [F.cross_entropy(logits[i].float(), t, reduction="none") for i, t in _few(logits, rows, targets)]
    return torch.cat(parts) if parts else logits.new_empty(0, dtype=torch.float32)


def _few(logits: torch.Tensor, *columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    size = max(1, LOGITS // logits.shape[1])
    return zip(*(column.split(size) for column in columns), strict=True)


class _CrossEntropy(torch.autograd.Function):
    """The same with a gradient, which takes the place of the logits: nothing of their size is made beside them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # What made the logits may keep them for its own backward (a tanh that caps them).
        ctx.in_place = not any(hasattr(logits.grad_fn, name) for name in ("_saved_result", "_saved_output"))
        ctx.save_for_backward(logits, rows, targets)
        return _cross_entropy(logits, rows, targets)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, rows, targets = ctx.saved_tensors
        found = logits.detach() if ctx.in_place else torch.zeros_like(logits)
        for i, t, g in _few(logits, rows, targets, gradients[0]):
            with torch.enable_grad():
                x = logits[i].detach().float().requires_grad_()
                loss = F.cross_entropy(x, t, reduction="none")
            found[i] = torch.autograd.grad(loss, x, g)[0].to(found.dtype)
        if ctx.in_place:
            unread = torch.ones(len(logits), dtype=torch.bool, device=logits.device).index_fill_(0, rows, False)
            found[unread] = 0
        return found, None, None
