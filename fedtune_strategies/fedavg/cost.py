"""What averaging costs a node: its trained tensors up and down, and what their training keeps in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fedtune_strategies.blocks.codec_config import UPLOAD_WIDTHS, kept_back_bytes
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.train import train_block
from fedtune_strategies.cost import HEADER, PROCESS, Cost, Fleet, Shape
from fedtune_strategies.fedavg.config import FedITRunConfig, FedZORunConfig
from fedtune_strategies.language.adapters import add_adapters
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import LanguageModel
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.speed import median_seconds, random_batch
from fedtune_strategies.zeroth_order import local_steps

TENSOR_HEADER = 70  # bytes: name, shape and place of one tensor in a message


def cost(config: Any, shape: Shape, fleet: Fleet) -> Cost:
    """Count a node's bytes; every formula stands in docs/planning.md."""
    train = config.train
    tensors = list(tuned_parameters(shape.model).values())
    if isinstance(config, FedITRunConfig):
        lora = config.lora
        adapters = add_adapters(copy.deepcopy(shape.model), lora.rank, lora.alpha, lora.targets, train.seed)
        tensors = list(adapters.values())
    trained = sum(tensor.numel() for tensor in tensors)
    tokens = train.batch_size * train.seq_length
    if isinstance(config, FedZORunConfig):  # the arrived tensors and those that leave
        own = 8 * trained + shape.activations(tokens)
    else:  # float32 copy, gradient, two moments and the change of each trained parameter
        own = 20 * trained + shape.kept_activations(tokens, shape.layers)
    upload = "float32" if isinstance(config, FedZORunConfig) else train.upload
    heads = HEADER + TENSOR_HEADER * len(tensors)
    up, down = round(UPLOAD_WIDTHS[upload] * trained) + heads, 4 * trained + heads
    asked = max(1, round(fleet.nodes * config.strategy.fraction_train))
    return Cost(
        memory=PROCESS + shape.weights + own,
        disk=shape.stored + kept_back_bytes(upload, trained),
        up=up,
        down=down,
        record=down,
        replies=asked * up,
        flop=(4.0 if isinstance(config, FedZORunConfig) else 6.0) * shape.parameters * train.local_steps * tokens,
    )


def seconds(config: Any, language: LanguageModel, examples: int, clock: Callable[[], float]) -> float:
    """Measure a task on random tokens: a step for each of the local steps."""
    model, train = language.model, config.train
    batch = random_batch(language, train.batch_size, train.seq_length)
    if isinstance(config, FedZORunConfig):
        pool = make_pool("gaussian", key=0, size=1)
        return train.local_steps * median_seconds(
            lambda: local_steps(model, pool, response_loss, [batch], [0], eps=1e-3, lr=1e-6), clock
        )
    if isinstance(config, FedITRunConfig):
        lora = config.lora
        names = tuple(add_adapters(model, lora.rank, lora.alpha, lora.targets, train.seed))
    else:
        names = tuple(tuned_parameters(model))
    block = Block(0, "all", "embedding", names)
    return train.local_steps * median_seconds(lambda: train_block(model, block, response_loss, [batch], 1, 1e-4), clock)
