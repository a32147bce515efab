"""The blocks of a run: the model's, or those of the adapters that are put into it."""

from __future__ import annotations

from torch import nn

from fedtune_strategies.blocks.find import Block, find_blocks
from fedtune_strategies.fedcybgd.config import FedCyBGDRunConfig
from fedtune_strategies.language.adapters import add_adapters


def cut_model(model: nn.Module, config: FedCyBGDRunConfig) -> tuple[Block, ...]:
    """Cut a model into blocks as a run configuration says.

    `model`: a causal language model. With ``fedcybgd.adapters`` it gets LoRA adapters, which changes it in place.
    Returns: of all parameters, or of the adapters' alone.
    """
    own, only = config.fedcybgd, None
    if own.adapters:
        lora = config.lora
        only = add_adapters(model, lora.rank, lora.alpha, lora.targets, config.train.seed).__contains__
    return find_blocks(model, own.layers_per_block, train_embeddings=own.train_embeddings, only=only)
