"""FedCyBGD as a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune_strategies.fedcybgd.config import FedCyBGDRunConfig
from fedtune_strategies.method import Method, deferred

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedtune_strategies.fedcybgd.strategy import FedCyBGD

CALIBRATION_ROWS = 128


def _strategy(config: FedCyBGDRunConfig, model: nn.Module, base: Mapping[str, Tensor]) -> FedCyBGD:
    from fedtune_strategies.fedcybgd.adapters import AdapterBlocks
    from fedtune_strategies.fedcybgd.partition import cut_model
    from fedtune_strategies.fedcybgd.strategy import FedCyBGD

    measure = partial(_influence, config, model)
    if config.fedcybgd.adapters:
        return AdapterBlocks(config, model, base, measure)
    return FedCyBGD(config, base, cut_model(model, config), measure)


def _influence(config: FedCyBGDRunConfig, model: nn.Module) -> list[float]:
    """Measure how much each layer matters, on text of the server."""
    from fedtune_strategies.blocks.rest import layer_influence
    from fedtune_strategies.language.data import read_rows
    from fedtune_strategies.language.examples import batches, tokenise
    from fedtune_strategies.language.loss import response_loss
    from fedtune_strategies.language.model import load_tokenizer

    rows = read_rows(Path(config.fedcybgd.calibration).expanduser(), "auto")[:CALIBRATION_ROWS]
    examples = tokenise(rows, load_tokenizer(config.model.name), config.train.seq_length)
    count = -(-len(examples) // config.train.batch_size)
    chosen = list(batches(examples, config.train.batch_size, count, ("calibration",)))
    return layer_influence(model, chosen, response_loss)


def _messages() -> Sequence[type]:
    from fedtune_strategies.fedcybgd.messages import BlockReply, BlockTask

    return BlockTask, BlockReply


def _leaves(config: FedCyBGDRunConfig) -> Sequence[str]:
    what = "the LoRA adapters of one block" if config.fedcybgd.adapters else "one block of the model"
    return (f"in its turns: the change of {what} by training on your data",)


def _parts(config: FedCyBGDRunConfig, model: nn.Module) -> Sequence[tuple[str, int, bool]]:
    from fedtune_strategies.blocks.find import block_sizes
    from fedtune_strategies.fedcybgd.partition import cut_model

    blocks = cut_model(model, config)
    sizes = dict(block_sizes(model, blocks))
    return [(block.name, sizes[block.index], block.frozen) for block in blocks]


FEDCYBGD = Method(
    name="fedcybgd",
    summary="one block of the model at a time, by AdamW; only that block travels exactly",
    config=FedCyBGDRunConfig,
    strategy=_strategy,
    client=deferred("fedtune_strategies.fedcybgd.client:FedCyBGDClient"),
    leaves=_leaves,
    messages=_messages,
    cost=deferred("fedtune_strategies.fedcybgd.cost:cost"),
    seconds=deferred("fedtune_strategies.fedcybgd.cost:seconds"),
    parts=_parts,
)
