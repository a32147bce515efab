"""What FedCyBGD costs a node: the weights, 20 bytes a parameter of the largest block, activations above it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

from fedtune_strategies.blocks.codec_config import UPLOAD_WIDTHS, coded_bytes, kept_back_bytes, parse_codec
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.train import train_block
from fedtune_strategies.cost import HEADER, PROCESS, Cost, Fleet, Shape
from fedtune_strategies.fedcybgd.config import FedCyBGDRunConfig
from fedtune_strategies.fedcybgd.partition import cut_model
from fedtune_strategies.fedcybgd.schedule import local_steps_rule
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import LanguageModel
from fedtune_strategies.speed import median_seconds, random_batch


def cost(config: FedCyBGDRunConfig, shape: Shape, fleet: Fleet) -> Cost:
    """Count a node's bytes; every formula stands in docs/planning.md."""
    own, train = config.fedcybgd, config.train
    model = copy.deepcopy(shape.model)
    blocks = [block for block in cut_model(model, config) if not block.frozen]
    tensors = [[tuple(model.get_parameter(name).shape) for name in block.parameters] for block in blocks]
    sizes = [sum(math.prod(one) for one in block) for block in tensors]
    count, at_once = len(sizes), own.nodes_per_round if own.structure != "sequential" else 1
    # A node trains in every (nodes / at once)-th round. Since its last turn the other blocks that moved come in the
    # coding of the rest, and its own exactly, as somebody else trained it last.
    turns = min(1.0, at_once / fleet.nodes)
    moved = min(count - 1, round(1 / turns) * (at_once if own.structure == "parallel" else 1) - 1)
    codec = parse_codec(own.rest)
    rest = sum(coded_bytes(block, codec, shape.width) for block in tensors) / count
    block = sum(sizes) / count
    up = UPLOAD_WIDTHS[train.upload] * block + HEADER
    tokens = train.batch_size * train.seq_length
    steps = train.local_steps or local_steps_rule(fleet.examples, train.batch_size, count)
    return Cost(
        memory=PROCESS + shape.weights + 20 * max(sizes) + shape.kept_activations(tokens, shape.layers),
        disk=shape.stored + kept_back_bytes(train.upload, sum(sizes)),
        up=round(turns * up),
        down=round(turns * (moved * rest + 4 * block * _trained_before(config, count, at_once, fleet.nodes) + HEADER)),
        record=round(4 * at_once * block),
        replies=round(at_once * up),
        flop=6.0 * shape.parameters * steps * own.accumulate * tokens,
        tasks=turns,
        largest=round(UPLOAD_WIDTHS[train.upload] * max(sizes)) + HEADER,
    )


def _trained_before(config: FedCyBGDRunConfig, blocks: int, at_once: int, nodes: int) -> float:
    """Part of the turns whose block was trained before by another node and so must come exactly."""
    turns = config.num_server_rounds * (at_once if config.fedcybgd.structure == "parallel" else 1)
    return max(0, turns - blocks) / turns * (1 if nodes > 1 else 0)


def seconds(config: FedCyBGDRunConfig, language: LanguageModel, examples: int, clock: Callable[[], float]) -> float:
    """Measure a turn on random tokens: steps on the first, the middle and the last block."""
    model, train = language.model, config.train
    batch = random_batch(language, train.batch_size, train.seq_length)
    blocks = [block for block in cut_model(model, config) if not block.frozen]

    def step(block: Block) -> float:
        return median_seconds(lambda: train_block(model, block, response_loss, [batch], 1, 1e-4), clock)

    mean = statistics.mean(step(block) for block in (blocks[0], blocks[len(blocks) // 2], blocks[-1]))
    steps = train.local_steps or local_steps_rule(examples, train.batch_size, len(blocks))
    return steps * config.fedcybgd.accumulate * mean
