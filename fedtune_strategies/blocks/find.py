"""Cut a model into blocks, by its module structure alone.

The repeated decoder layers are the largest outermost ``ModuleList`` of a model, by any name. Everything
outside it is embedding, head or norm by the type of the module that owns it. So an architecture needs no entry in
any list, and a PEFT model is cut exactly like the model that it wraps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from fedtune_strategies.errors import ConfigError, ModelError

Kind = Literal["embedding", "layer", "norm", "head"]


@dataclass(frozen=True)
class Block:
    """A set of parameters that is trained, versioned and sent as one."""

    index: int  # position in the tuple that `find_blocks` returns; ordered from the input to the output of the model
    name: str  # for people: ``"layer 3"``, ``"layers 2-3"``, ``"embedding"``, ``"layer 3 and norm"``
    kind: Kind  # what the block is, or most of it
    # canonical parameter names: as in ``model.named_parameters()``, where tied weights appear once, under the first
    # name
    parameters: tuple[str, ...]
    layer: int | None = None  # the first decoder layer of the block; None outside the layers
    depth: int = 0  # number of decoder layers in the block; 0 outside the layers
    with_norm: bool = False  # whether a block of layers holds the final norm too
    # True for a block that is never trained. It is still a block: a node that holds nothing receives it.
    frozen: bool = False


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of repeated decoder layers and its name: the outermost ``ModuleList`` with the most parameters."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside_another:
            found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder layers, so it cannot be cut into blocks; "
            "choose a decoder-only model or method.name = fedkseed"
        )
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def find_blocks(
    model: nn.Module,
    layers_per_block: int = 1,
    train_embeddings: bool = True,
    only: Callable[[str], bool] | None = None,
) -> tuple[Block, ...]:
    """Partition the parameters of a causal language model, also in a PEFT model, into blocks from input to output.

    Every parameter that `only` accepts and a gradient can train is in exactly one block; a head tied to the embedding
    is part of the embedding. The final norm is part of the last layer's block: its own turn would train a few vectors.
    Frozen or with matrices among its parameters (OPT's projections) it is its own block. Blocks without parameters do
    not exist. Without `train_embeddings`, embedding, final norm and head are frozen: what the published code does.
    """
    if layers_per_block < 1:
        raise ConfigError(f"layers per block must be 1 or more, not {layers_per_block}")
    path, layers = decoder_layers(model)
    names = [name for name, p in model.named_parameters() if _trainable(p) and (only is None or only(name))]
    in_layer = re.compile(rf"{re.escape(path)}\.(\d+)\.")
    outside: dict[str, list[str]] = {"embedding": [], "norm": [], "head": []}
    inside: dict[int, list[str]] = {}
    for name in names:
        match = in_layer.match(name)
        if match:
            inside.setdefault(int(match[1]), []).append(name)
        else:
            outside[_kind_outside(model, name)].append(name)

    blocks = [_outside_block("embedding", outside, train_embeddings)]
    for first in range(0, len(layers), layers_per_block):
        last = min(first + layers_per_block, len(layers)) - 1
        members = [name for layer in range(first, last + 1) for name in inside.get(layer, [])]
        label = f"layer {first}" if first == last else f"layers {first}-{last}"
        blocks.append(Block(0, label, "layer", tuple(members), first, last + 1 - first))
    norm = outside["norm"]
    vectors = all(model.get_parameter(name).dim() == 1 for name in norm)
    if train_embeddings and norm and vectors and blocks[-1].parameters:
        blocks[-1] = _with_norm(blocks[-1], norm)
        outside["norm"] = []
    blocks += [_outside_block(kind, outside, train_embeddings) for kind in ("norm", "head")]
    present = [block for block in blocks if block.parameters]
    return tuple(replace(block, index=index) for index, block in enumerate(present))


def block_sizes(model: nn.Module, blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """Return index and number of parameters of each block."""
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return [(block.index, sum(numel[name] for name in block.parameters)) for block in blocks]


def _trainable(parameter: nn.Parameter) -> bool:
    """Not a routing bias that its model keeps out of gradients, nor codes in 8 bits or fewer."""
    return parameter.requires_grad and parameter.is_floating_point() and parameter.element_size() > 1


def _kind_outside(model: nn.Module, name: str) -> Kind:
    """Kind of a parameter outside the layers, by the module that owns it."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "head" if owner is model.get_output_embeddings() else "norm"  # type: ignore[operator]


def _outside_block(kind: Kind, outside: dict[str, list[str]], trained: bool) -> Block:
    return Block(0, kind, kind, tuple(outside[kind]), frozen=not trained)


def _with_norm(block: Block, norm: list[str]) -> Block:
    return replace(block, name=f"{block.name} and norm", parameters=(*block.parameters, *norm), with_norm=True)
