"""The blocks of a run: the model's, or those of the adapters that are put into it."""

from __future__ import annotations

from torch import nn

from fedtune_strategies.blocks.find import Block, find_blocks
from fedtune_strategies.config import Config
from fedtune_strategies.language.adapters import add_adapters


def cut_model(model: nn.Module, config: Config) -> tuple[Block, ...]:
    """Cut a model into blocks as a run configuration says.

    Parameters
    ----------
    model : nn.Module
        A causal language model. With ``fedcybgd.adapters`` it gets LoRA adapters, which changes it in place.
    config : Config
        The run configuration.

    Returns
    -------
    tuple of Block
        Of all parameters, or of the adapters' alone.
    """
    own = config.fedcybgd
    only = add_adapters(model, config.fedavg, config.train.seed).__contains__ if own.adapters else None
    return find_blocks(model, own.layers_per_block, own.split, own.train_embeddings, own.final_norm, only)
