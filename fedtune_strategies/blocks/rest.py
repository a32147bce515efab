"""Which decoder layers a node may do without.

Source of block influence: ShortGPT (arXiv 2403.03853), equation 1. FedCyBGD (arXiv 2406.11187) drops such layers; here
the responsible block itself and its neighbours stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fedtune_strategies.blocks.find import Block, decoder_layers
from fedtune_strategies.blocks.layers import without_layers
from fedtune_strategies.errors import ConfigError, ModelError

Run = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def layer_influence(model: nn.Module, batches: Sequence[Any], run: Run) -> list[float]:
    """Measure how much every decoder layer changes the hidden states: 1 − cos(in, out), the mean over all tokens."""
    _, layers = decoder_layers(model)
    totals, tokens = [0.0] * len(layers), [0] * len(layers)

    def note(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = output if isinstance(output, Tensor) else output[0]
        distance = 1 - cosine_similarity(hidden.float(), output.float(), dim=-1)
        totals[index] += distance.sum().item()
        tokens[index] += distance.numel()

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = layer.register_forward_hook(
                lambda _, args, kwargs, output, index=index: note(index, args, kwargs, output), with_kwargs=True
            )
            stack.callback(hook.remove)
        for batch in batches:
            run(model, batch)
    for index in range(len(layers)):
        _require_droppable(model, index, batches[0], run)
    return [total / count for total, count in zip(totals, tokens, strict=True)]


def _require_droppable(model: nn.Module, layer: int, batch: Any, run: Run) -> None:
    try:
        with without_layers(model, [layer]):
            run(model, batch)
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        line = " ".join(str(error).split())[:100]
        raise ModelError(
            f"{type(model).__name__} does not run without its decoder layer {layer} ({line}): "
            "choose a codec without drop"
        ) from None


def dropped_layers(influence: Sequence[float], count: int, block: Block) -> tuple[int, ...]:
    """Choose the layers to leave out in a turn: those of least influence, never the block or its neighbours."""
    if block.layer is not None:
        near = range(block.layer - 1, block.layer + block.depth + 1)
    else:
        near = range(1) if block.kind == "embedding" else range(len(influence) - 1, len(influence))
    candidates = [layer for layer in range(len(influence)) if layer not in near]
    if count > len(candidates):
        raise ConfigError(
            f"cannot leave out {count} layers while {block.name} is trained: of {len(influence)} layers only "
            f"{len(candidates)} are neither in that block nor beside it"
        )
    return tuple(sorted(sorted(candidates, key=lambda layer: (influence[layer], layer))[:count]))


def blocks_inside(blocks: Iterable[Block], layers: Collection[int]) -> set[int]:
    """Return the indices of the blocks that are in these layers alone."""
    return {
        block.index
        for block in blocks
        if block.layer is not None
        and not block.with_norm
        and all(layer in layers for layer in range(block.layer, block.layer + block.depth))
    }
