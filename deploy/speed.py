"""How fast this machine is: the three things that a node spends its time on, done for real on a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.train import train_block
from fedtune_strategies.config import Config
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import LanguageModel, base_tensors
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import local_steps


@dataclass(frozen=True)
class Speed:
    """Seconds, medians.

    Attributes
    ----------
    rebuild : float
        W(theta) from theta, all K seeds at work.
    seed_step : float
        One step of FedKSeed on one batch.
    block_step : float
        One step of FedCyBGD on one batch, mean of the first, the middle and the last block.
    """

    rebuild: float
    seed_step: float
    block_step: float


def measure(
    language: LanguageModel, config: Config, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Measure on random tokens; the model ends at random weights.

    Parameters
    ----------
    language : LanguageModel
        Freshly loaded.
    config : Config
        Gives batch size, sequence length, K and pool.
    repeats : int
        Of each measurement.
    clock : callable
        Gives seconds; `time.process_time` leaves out what other programs took.
    """
    model, train, own = language.model, config.train, config.fedkseed
    batch = _batch(len(language.tokenizer), train.batch_size, train.seq_length)
    blocks = [block for block in find_blocks(model) if not block.frozen]
    turns = [
        _seconds(lambda block=block: train_block(model, block, response_loss, [batch], 1, 1e-4), repeats, clock)  # type: ignore[misc]
        for block in (blocks[0], blocks[len(blocks) // 2], blocks[-1])
    ]
    pool = make_pool(own.pool, key=0, size=own.seeds)
    steps = _seconds(
        lambda: local_steps(model, pool, response_loss, [batch], [0], eps=own.eps, lr=own.lr, pattern=own.tune or None),
        repeats,
        clock,
    )
    base, parameters = base_tensors(language), tuned_parameters(model, own.tune or None)
    theta = torch.full((own.seeds,), 1e-6)
    rebuild = _seconds(lambda: pool.rebuild_model(parameters, base, theta), repeats, clock)
    return Speed(rebuild, steps, statistics.mean(turns))


def _batch(vocabulary: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _seconds(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Median after one run that does not count: kernels are compiled in it."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)
