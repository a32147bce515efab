"""The loss: mean cross-entropy over response tokens. Training and evaluation use this one definition."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fedtune_strategies.language.examples import IGNORE, Batch


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
    """Return `response_loss`, computed on a few rows at a time: the same mean in less memory, without a gradient.

    Parameters
    ----------
    rows : int
        Rows computed at once; 0 for all.

    Returns
    -------
    callable
        Loss of (model, batch).
    """

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
    """Cross-entropy of each response token of a batch, in nats.

    Logits are computed only at positions before a response token of some row, and turned into float32 only where a
    response token follows: with a large vocabulary they outweigh everything else in memory.

    Parameters
    ----------
    model, batch
        As `response_loss`.

    Returns
    -------
    torch.Tensor
        (response tokens,), float32, row by row.
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
    return F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
