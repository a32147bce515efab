"""What a method will cost, before anybody trains: memory, bytes and seconds of a node, from the model's shape alone.

Every formula stands in docs/planning.md; bytes are checked there and in the tests against runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deploy.speed import Speed
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.notation import Codec, parse_codec
from fedtune_strategies.blocks.schedule import local_steps_rule
from fedtune_strategies.config import Config
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.language.model_files import count_parameters, weight_files
from fedtune_strategies.protocol.packing import pack

PLANNED = ("fedkseed", "fedkseed-pro", "fedcybgd")
PROCESS = 480 * 10**6  # bytes: a worker with torch and transformers imported, without a model
KERNELS = 100 * 10**6  # bytes: compiling the seed space's kernels
ENVELOPE = 13_400  # bytes: what Flower adds to one task and its reply over gRPC, TLS included (docs/LOG.md)
HEADER = 350  # bytes: names, numbers and fingerprint of one message of ours
LEVEL_BITS = 6  # of a seed's level under FedKSeed-Pro
RESPONSE = 0.5  # part of a sequence for which logits are computed: a guess, it depends on the data


@dataclass(frozen=True)
class Shape:
    """A model as the formulas need it.

    Attributes
    ----------
    parameters : int
        P; tied ones count once.
    layers, hidden, inner, vocabulary : int
        Decoder layers, width, width within an MLP, tokens.
    blocks : list of list of tuple
        Shapes of the parameters of each trained block.
    stored : int
        Bytes of the weight files.
    """

    parameters: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    blocks: list[list[tuple[int, ...]]]
    stored: int


@dataclass(frozen=True)
class Plan:
    """What a node needs.

    Attributes
    ----------
    method : str
        The method.
    memory, disk : int
        Bytes: of the worker; of the base model.
    up, down : int
        Bytes of payload a node and round, on average over nodes and rounds, Flower's envelope not included.
    tasks : float
        Messages a node and round.
    seconds : float or None
        Of a node's task, where the speed is known.
    """

    method: str
    memory: int
    disk: int
    up: int
    down: int
    tasks: float
    seconds: float | None

    def link_seconds(self, bits: float) -> float:
        """Seconds on the wire a round at so many bits a second each way."""
        return 8 * (self.up + self.down + self.tasks * ENVELOPE) / bits


def shape_of(folder: Path, config: Config) -> Shape:
    """Read a model's shape; no weight is loaded."""
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(settings)
    own = config.fedcybgd
    blocks = find_blocks(model, own.layers_per_block, own.split, own.train_embeddings, own.final_norm)
    parameters = dict(model.named_parameters())
    text = settings.get_text_config()
    hidden = text.hidden_size
    return Shape(
        parameters=sum(value.numel() for value in parameters.values()),
        layers=text.num_hidden_layers,
        hidden=hidden,
        inner=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        vocabulary=text.vocab_size,
        blocks=[[tuple(parameters[name].shape) for name in one.parameters] for one in blocks if not one.frozen],
        stored=count_parameters(weight_files(folder)) * 4,
    )


def plan_seeds(config: Config, shape: Shape, nodes: int, speed: Speed | None) -> Plan:
    """FedKSeed and FedKSeed-Pro: inference's memory, scalars on the wire, τ steps of two forward passes."""
    own, train, width = config.fedkseed, config.train, _width(config)
    tokens = (own.micro_batch or train.batch_size) * train.seq_length
    activations = 4 * tokens * (8 * shape.hidden + 4 * shape.inner) + _logits(tokens, shape, width)
    draws = max(1, round(nodes * config.strategy.fraction_train)) * own.local_steps
    # FedKSeed-Pro sends each seed's level as well; in the middle of the run half of all draws have been made.
    pro = config.method.name == "fedkseed-pro"
    odds = change_bytes(own.seeds, draws * config.num_server_rounds // 2, LEVEL_BITS) if pro else 0
    return Plan(
        method=config.method.name,
        memory=PROCESS + KERNELS + width * shape.parameters + activations,
        disk=shape.stored,
        up=own.local_steps * own.scalar_bits // 8 + HEADER,
        down=change_bytes(own.seeds, draws, own.theta_bits) + odds + HEADER,
        tasks=1.0,
        seconds=speed.rebuild + own.local_steps * speed.seed_step if speed else None,
    )


def change_bytes(seeds: int, draws: int, bits: int) -> int:
    """Bytes of a packed change of theta after so many draws among K seeds: random moves, really packed."""
    random = np.random.default_rng(0)
    moves = np.zeros(seeds)
    np.add.at(moves, random.integers(0, seeds, draws), random.standard_normal(draws))
    units = np.rint(moves / max(np.abs(moves).max(), 1e-9) * (2 ** (bits - 1) - 1))
    return pack(units.astype(np.int32)).numel()


def plan_blocks(config: Config, shape: Shape, nodes: int, examples: int, speed: Speed | None) -> Plan:
    """FedCyBGD: weights, 20 bytes a parameter of the largest block, activations of the layers above it."""
    own, train, width = config.fedcybgd, config.train, _width(config)
    sizes = [sum(math.prod(tensor) for tensor in block) for block in shape.blocks]
    tokens = train.batch_size * train.seq_length
    # Kept for the backward pass, a token, layer and unit of width: 25 values, measured on Llamas. The 17 of
    # arXiv 2205.05198, equation 2, are without attention matrices and for an MLP of two matrices.
    depth = 1 if own.checkpoint else shape.layers
    activations = 25 * width * tokens * shape.hidden * depth + _logits(tokens, shape, width)
    count, at_once = len(sizes), own.nodes_per_round if own.structure != "sequential" else 1
    steps = own.local_steps or local_steps_rule(examples, train.batch_size, count)
    # A node trains in every (nodes / at once)-th round. Since its last turn the other blocks that moved come in the
    # coding of the rest, and its own exactly, as somebody else trained it last.
    turns = min(1.0, at_once / nodes)
    moved = min(count - 1, round(1 / turns) * (at_once if own.structure == "parallel" else 1) - 1)
    codec = parse_codec(own.rest)
    rest = sum(coded_bytes(block, codec, width) for block in shape.blocks) / count
    block = sum(sizes) / count
    return Plan(
        method=config.method.name,
        memory=PROCESS + width * shape.parameters + 20 * max(sizes) + activations,
        disk=shape.stored,
        up=round(turns * ({"float32": 4, "bf16": 2, "int8": 1}[own.upload] * block + HEADER)),
        down=round(turns * (moved * rest + 4 * block * _trained_before(config, count, at_once, nodes) + HEADER)),
        tasks=turns,
        seconds=steps * own.accumulate * speed.block_step if speed else None,
    )


def coded_bytes(tensors: list[tuple[int, ...]], codec: Codec, width: int) -> float:
    """Bytes of parameters in the coding of the rest (`fedtune_strategies.blocks.codecs`)."""
    total = 0.0
    for shape in tensors:
        numel = math.prod(shape)
        if len(shape) < 2:
            total += width * numel
            continue
        kept = numel * (1 - codec.prune)
        value, scales = {"none": (width, 0.0), "bf16": (2, 0.0), "int8": (1, 4.0 * shape[0]), "nf4": (0.5, kept / 16)}[
            codec.quantisation
        ]
        total += kept * value + scales + (numel / 8 if codec.prune else 0)
    return total


def _trained_before(config: Config, blocks: int, at_once: int, nodes: int) -> float:
    """Part of the turns whose block was trained before by another node and so must come exactly."""
    turns = config.num_server_rounds * (at_once if config.fedcybgd.structure == "parallel" else 1)
    return max(0, turns - blocks) / turns * (1 if nodes > 1 else 0)


def _logits(tokens: int, shape: Shape, width: int) -> int:
    return round(RESPONSE * tokens * shape.vocabulary * (width + 4))


def _width(config: Config) -> int:
    return int(getattr(torch, config.model.dtype).itemsize)


def plan(config: Config, folder: Path, nodes: int, examples: int, speed: Speed | None) -> Plan:
    """Plan a run of a method that FedTune brings.

    Parameters
    ----------
    config : Config
        The run configuration.
    folder : Path
        Folder of the base model.
    nodes, examples : int
        Size of the fleet, and examples that a node holds.
    speed : Speed or None
        Of the machine that shall do it; None for no times.

    Raises
    ------
    ConfigError
        The method is none of FedTune's own.
    """
    shape = shape_of(folder, config)
    match config.method.name:
        case "fedkseed" | "fedkseed-pro":
            return plan_seeds(config, shape, nodes, speed)
        case "fedcybgd":
            return plan_blocks(config, shape, nodes, examples, speed)
    raise ConfigError(f"there is no plan for the method {config.method.name!r}: plan {', '.join(PLANNED)}")
