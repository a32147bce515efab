"""What FedKSeed costs a node: inference's memory, scalars on the wire, tau steps of two forward passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedtune_strategies.cost import HEADER, PROCESS, Cost, Fleet, Shape
from fedtune_strategies.fedkseed.config import FedKSeedProRunConfig, FedKSeedRunConfig, GradientRunConfig
from fedtune_strategies.fedkseed.packing import pack
from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import LanguageModel
from fedtune_strategies.seed_gradient import slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.speed import median_seconds, random_batch
from fedtune_strategies.zeroth_order import local_steps

KERNELS = 100 * 10**6  # bytes: compiling the seed space's kernels
TASK_HEADER = 85  # bytes: a task names neither node nor fingerprint
LEVEL_BITS = 6  # of a seed's level under FedKSeed-Pro


def cost(config: FedKSeedRunConfig | GradientRunConfig, shape: Shape, fleet: Fleet) -> Cost:
    """Count a node's bytes; every formula stands in docs/planning.md."""
    if isinstance(config, GradientRunConfig):
        return _gradient_cost(config, shape, fleet)
    own, train = config.fedkseed, config.train
    draws = max(1, round(fleet.nodes * config.strategy.fraction_train)) * train.local_steps
    # FedKSeed-Pro sends each seed's level as well; in the middle of the run half of all draws have been made.
    pro = isinstance(config, FedKSeedProRunConfig)
    odds = change_bytes(own.seeds, draws * config.num_server_rounds // 2, LEVEL_BITS) if pro else 0
    up = train.local_steps * own.scalar_bits // 8 + HEADER
    return Cost(
        memory=PROCESS + KERNELS + shape.weights + shape.activations(train.batch_size * train.seq_length),
        disk=shape.stored,
        up=up,
        down=change_bytes(own.seeds, draws, own.theta_bits) + odds + TASK_HEADER,
        record=8 * own.seeds,
        replies=up * max(1, round(fleet.nodes * config.strategy.fraction_train)),
        flop=4.0 * shape.parameters * train.local_steps * train.batch_size * train.seq_length,
    )


def _gradient_cost(config: GradientRunConfig, shape: Shape, fleet: Fleet) -> Cost:
    """Inference, hidden states at each layer, and one layer's activations; the moved weights are a mapped file."""
    own, train = config.fedkseed, config.train
    tokens = train.batch_size * train.seq_length
    up, down = own.seeds * own.up_bits // 8 + HEADER, own.seeds * own.down_bits // 8 + TASK_HEADER
    return Cost(
        memory=PROCESS
        + KERNELS
        + shape.weights
        + shape.width * tokens * shape.hidden * shape.layers
        + shape.kept_activations(tokens, 1),
        disk=shape.stored + 4 * shape.parameters,
        up=up,
        down=down,
        record=down,
        replies=up * max(1, round(fleet.nodes * config.strategy.fraction_train)),
        flop=8.0 * shape.parameters * train.local_steps * tokens,
    )


def change_bytes(seeds: int, draws: int, bits: int) -> int:
    """Bytes of a packed change of theta after so many draws among K seeds: random moves, really packed."""
    random = np.random.default_rng(0)
    moves = np.zeros(seeds)
    np.add.at(moves, random.integers(0, seeds, draws), random.standard_normal(draws))
    units = np.rint(moves / max(np.abs(moves).max(), 1e-9) * (2 ** (bits - 1) - 1))
    return pack(units.astype(np.int32)).numel()


def seconds(
    config: FedKSeedRunConfig | GradientRunConfig, language: LanguageModel, examples: int, clock: Callable[[], float]
) -> float:
    """Measure one task on random tokens: the rebuild once, and a step for each of tau."""
    if isinstance(config, GradientRunConfig):
        return _gradient_seconds(config, language, clock)
    model, train, own = language.model, config.train, config.fedkseed
    batch = random_batch(language, train.batch_size, train.seq_length)
    pool, pattern = make_pool(own.pool, key=0, size=own.seeds), train.parameters or None
    eps, lr = own.eps or 1e-3, train.lr or 1e-4
    step = median_seconds(
        lambda: local_steps(model, pool, response_loss, [batch], [0], eps=eps, lr=lr, pattern=pattern), clock
    )
    parameters = tuned_parameters(model, pattern)
    base = {name: tensor for name, tensor in base_tensors(language).items() if name in parameters}
    theta = torch.full((own.seeds,), 1e-6)
    return median_seconds(lambda: pool.rebuild_model(parameters, base, theta), clock) + train.local_steps * step


def _gradient_seconds(config: GradientRunConfig, language: LanguageModel, clock: Callable[[], float]) -> float:
    """A step rebuilds the weights and finds their slopes."""
    train, own = config.train, config.fedkseed
    batch = random_batch(language, train.batch_size, train.seq_length)
    parameters = tuned_parameters(language.model, train.parameters or None)
    base = {name: tensor for name, tensor in base_tensors(language).items() if name in parameters}
    pool, theta = make_pool(own.pool, key=0, size=own.seeds), torch.zeros(own.seeds)
    rebuild = median_seconds(lambda: pool.rebuild_model(parameters, base, theta), clock)
    step = median_seconds(lambda: slopes(language.model, parameters, response_loss, batch, pool), clock)
    return rebuild + train.local_steps * (rebuild + step)
