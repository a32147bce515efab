"""A node's side of FedKSeed: theta as it holds it, and the local steps from there."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedkseed.config import FedKSeedRunConfig
from fedtune_strategies.fedkseed.messages import SeedReply, SeedTask
from fedtune_strategies.fedkseed.packing import round_scalars, unpack
from fedtune_strategies.fedkseed.pools import BeforeLast, nth_pool, pool_number, rebuild
from fedtune_strategies.fedkseed.seed_draws import compared, draw_seeds, seed_key
from fedtune_strategies.language.coded import Only
from fedtune_strategies.language.examples import Batch, collate
from fedtune_strategies.language.loss import example_losses, finite_mean, loss_in_parts
from fedtune_strategies.memory import private_peak
from fedtune_strategies.method import NodeContext
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import Pool, fingerprint, tuned_parameters
from fedtune_strategies.seed_space.moved import AtPoint
from fedtune_strategies.zeroth_order import LocalSteps, check_steps, local_steps
from fedtune_strategies.zeroth_order.calibrate import DIRECTIONS, Calibration, calibrate
from fedtune_strategies.zeroth_order.estimators import Estimator
from fedtune_strategies.zeroth_order.private import poisson_sample, private_two_sided
from fedtune_strategies.zeroth_order.steps import Loss

EMPTY: Batch = {"labels": torch.empty(0, 1, dtype=torch.int64)}


class FedKSeedClient:
    """Theta of the node's last task, and what it takes to work from it."""

    def __init__(self, context: NodeContext) -> None:
        self._config: FedKSeedRunConfig = context.config
        self._model, self._base = context.model, context.base
        self._name, self._examples = context.name, context.examples
        self._batches, self._secret = context.batches, context.secret
        self._micro_batch, self._by_layers = context.node.micro_batch, context.node.frozen != "decoded"
        self._pattern = self._config.train.parameters or None
        self._parameters = tuned_parameters(self._model, self._pattern)
        if not self._by_layers:  # otherwise the model is empty, and a loss that is not a number shows it
            check_steps(self._model, self._pattern)
        # The theta of the last task, as whole numbers of the run's unit, int32 [pools, K]: floats would round
        # differently when they are added in another order. Version 0 is theta = 0, the base model, which every node
        # has.
        self._version = 0
        self._units = np.zeros((1, self._config.fedkseed.seeds), dtype=np.int32)

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer a `SeedTask`."""
        if not isinstance(task, SeedTask):
            raise ProtocolError(f"a node of FedKSeed cannot answer a '{task.kind}'.")
        # What is asked, in order: hold the server's theta, find a step size where none is given, walk tau steps from
        # there. Only the scalars go back: which seeds they belong to, the server draws again from the same key.
        start = time.monotonic()
        if not self.take(task):
            return protocol.StateMissing(self._name, task.round)
        found = self.calibrate(task)
        steps, starting_print = self.train(task, found)
        scalars, unit = round_scalars(steps.g, self._config.fedkseed.scalar_bits)
        loss, _ = finite_mean(steps.loss)
        return SeedReply(
            node=self._name,
            round=task.round,
            scalars=scalars,
            unit=unit,
            loss=math.nan if self._config.privacy.clip else loss,  # a loss tells something about the data
            fingerprint=starting_print,
            num_examples=len(self._examples),
            seconds=time.monotonic() - start,
            peak_memory=private_peak(),
            lr=found.lr,
            noise=found.noise,
            key=self._key(task.round),
        )

    def take(self, task: SeedTask) -> bool:
        """Take up the theta of a task; says whether the node held the theta that the task counts on."""
        if task.since not in (0, self._version):
            # Either the last task came once more, or this worker was started again and lacks the theta on which the
            # change counts.
            return self._version == task.round - 1  # is it the last task again?
        held = self._units if task.since else np.zeros_like(self._units[:1])
        units = np.zeros((pool_number(self._config, task.round) + 1, held.shape[1]), dtype=np.int32)
        units[: len(held)] = held
        # A change runs over the newest pool that the node knew and those that were opened since: closed ones are final.
        changed = units[len(held) - 1 :]
        changed += unpack(task.change, changed.size).reshape(changed.shape)
        self._units, self._version = units, task.round - 1
        return True

    def calibrate(self, task: SeedTask) -> Calibration:
        """Find the step size where a task that was taken up leaves it open, and say then how noisy slopes are."""
        if task.lr:
            return Calibration(task.lr, math.nan)
        # Round 0 is no round: a node that is started again finds the same step size on the same batch.
        settings = self._config.fedkseed
        start, base, _ = self._rebuild(task)
        found = calibrate(
            self._model,
            self._pool(),
            loss_in_parts(self._micro_batch),
            next(self._batches(0, 1)),
            range(min(DIRECTIONS, settings.seeds)),
            eps=task.eps,
            steps=self._config.train.local_steps,
            pattern=self._pattern,
            signs=settings.estimator == "sign",
            start=start,
            base=base,
        )
        exact = settings.estimator == "forward"
        return Calibration(found.lr, math.nan) if exact else found

    def train(self, task: SeedTask, found: Calibration) -> tuple[LocalSteps, str]:
        """Take the round's local steps; returns them with the fingerprint of the weights on which they began."""
        settings = self._config.fedkseed
        key = seed_key(self._config, task.round, self._name, self._key(task.round))
        odds = self._odds(task)
        seeds = draw_seeds(key, self._config.train.local_steps, settings.seeds, odds)
        # Taken before the first step: the server compares it with its own W(theta), so a node with another base model,
        # other kernels or a wrong theta is found out before its scalars count.
        start, base, starting_print = self._rebuild(task)
        # The steps move the weights in place, W <- W - lr g_t z_(s_t): there is no gradient and no state of an
        # optimiser. The next task rebuilds from W_0, so rounding of one round never enters the next.
        estimator, loss, data = self._plan(task)
        steps = local_steps(
            self._model,
            self._pool(),
            loss,
            data,
            seeds,
            eps=task.eps,
            lr=found.lr,
            limit=task.limit,
            pattern=self._pattern,
            start=start,
            base=base,
            estimator=estimator,
            directions=settings.directions,
        )
        return steps, starting_print

    def _key(self, round: int) -> str:
        return "" if compared(self._config) else self._secret("seeds", round)

    def _rebuild(self, task: SeedTask) -> tuple[Tensor | None, Mapping[str, Tensor] | None, str]:
        """Put the model at theta; or, where it is empty, return where to start and from what. With the fingerprint."""
        points = list((self._units * task.unit).astype(np.float32))
        if not self._by_layers:
            rebuild(self._config, points, self._parameters, self._base)
            return None, None, fingerprint(self._parameters)
        start, base = torch.from_numpy(points[-1]), BeforeLast(self._config, points, self._base, self._parameters)
        at = AtPoint(self._pool(), Only(base, self._parameters), self._base)
        at.theta = start
        return start, base, fingerprint((name, at[name]) for name in self._parameters)

    def _pool(self) -> Pool:
        return nth_pool(self._config, len(self._units) - 1)

    def _plan(self, task: SeedTask) -> tuple[str | Estimator, Loss, Iterator[Batch]]:
        """Say how slopes are found, of which loss, on which batches."""
        examples = self._examples
        settings, privacy, size = self._config.fedkseed, self._config.privacy, self._config.train.batch_size
        count = -(-self._config.train.local_steps // settings.directions)
        if not privacy.clip:
            return settings.estimator, loss_in_parts(self._micro_batch), self._batches(task.round, count)
        # Privacy by subsampling counts on each example being drawn by itself, so batches vary in size and may be empty.
        size = min(size, len(examples))
        drawn = poisson_sample(len(examples), size / len(examples), count)
        data = (collate(examples, indices) if indices else EMPTY for indices in drawn)
        return private_two_sided(privacy.clip, privacy.noise_multiplier, size), example_losses, data

    def _odds(self, task: SeedTask) -> NDArray[np.int16]:
        if not task.odds.numel():
            return np.empty(0, dtype=np.int16)
        # Each seed's level, [K], and each level's odds: the product is an integer weight for every seed, alike on both
        # sides.
        levels, odds = unpack(task.levels, self._config.fedkseed.seeds), task.odds.numpy()
        if (
            odds.dtype != np.int16
            or odds.ndim != 1
            or odds.min() < 1
            or not 0 <= levels.min() <= levels.max() < len(odds)
        ):
            raise ProtocolError("the odds of the seeds are not one positive number for each.")
        return odds[levels]
