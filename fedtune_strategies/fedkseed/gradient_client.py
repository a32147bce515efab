"""A node's side of the seed-space gradient: the weights as past rounds moved them, and a walk in the round's pool."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedkseed.config import GradientRunConfig
from fedtune_strategies.fedkseed.messages import GradientReply, GradientTask, GradientWeights
from fedtune_strategies.fedkseed.moved import Moved
from fedtune_strategies.language.coded import Only
from fedtune_strategies.language.examples import Batch, collate
from fedtune_strategies.language.loss import finite_mean, micro_batches, response_loss, response_tokens
from fedtune_strategies.memory import prefer_memory, private_peak
from fedtune_strategies.method import NodeContext
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_gradient import LocalWalk, decode, encode, local_walk, packed_bytes, slopes
from fedtune_strategies.seed_gradient.private import private_sum
from fedtune_strategies.seed_gradient.slopes import Slopes
from fedtune_strategies.seed_space import Pool, fingerprint, tuned_parameters
from fedtune_strategies.seed_space.moved import AtPoint
from fedtune_strategies.zeroth_order.private import poisson_sample

Find: TypeAlias = Callable[[Batch], Slopes]


class SeedGradientClient:
    """The weights after the rounds that the node knows of, and what it takes to walk from there."""

    def __init__(self, context: NodeContext) -> None:
        self._config: GradientRunConfig = context.config
        self._model, self._name, self._examples = context.model, context.name, context.examples
        self._micro_batch, self._batches = context.node.micro_batch, context.batches
        self._checkpoint = context.node.checkpoint != "never" or context.node.frozen != "decoded"
        self._parameters = tuned_parameters(self._model, self._config.train.parameters or None)
        if self._checkpoint:
            prefer_memory()
        self._base, self._by_layers = context.base, context.node.frozen != "decoded"
        self._moved = Moved(self._config, Only(self._base, self._parameters))

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer a `GradientTask`, or a part of the weights on which one builds."""
        if isinstance(task, GradientWeights):
            answer = protocol.Ack if self._moved.receive(task) else protocol.StateMissing
            return answer(self._name, task.round)
        if not isinstance(task, GradientTask):
            raise ProtocolError(f"a node of the seed-space gradient cannot answer a '{task.kind}'.")
        start = time.monotonic()
        if not self.take(task):
            return protocol.StateMissing(self._name, task.round)
        starting_print = self._fingerprint()
        walk = self.walk(task)
        levels, unit = encode(walk.theta.numpy(), self._config.fedkseed.up_bits)
        loss, counted = finite_mean(walk.loss)
        if self._config.privacy.clip:
            loss = math.nan  # a loss tells something about the data
        return GradientReply(
            node=self._name,
            round=task.round,
            levels=levels,
            unit=unit,
            loss=loss,
            skipped=walk.loss.size - counted,
            fingerprint=starting_print,
            num_examples=len(self._examples),
            seconds=time.monotonic() - start,
            peak_memory=private_peak(),
        )

    def take(self, task: GradientTask) -> bool:
        """Move the weights by the points of a task; says whether they are then those of its round."""
        own, since = self._config.fedkseed, max(0, task.since)
        width = packed_bytes(own.seeds, own.down_bits)
        if task.levels.shape != (task.round - 1 - since, width) or task.units.shape != task.levels.shape[:1]:
            raise ProtocolError("a gradient task's points do not fit the run: run the same FedTune version everywhere.")
        points = [
            decode(levels, float(unit), own.down_bits, own.seeds)
            for levels, unit in zip(task.levels, task.units, strict=True)
        ]
        if task.since < 0:
            self._moved.weights.reset()
        held = self._moved.rounds
        if not since <= held < task.round:
            return False
        # The server may not know of the newest: the reply that would have said so did not arrive.
        self._moved.follow(points[held - since :])
        return True

    def walk(self, task: GradientTask) -> LocalWalk:
        """Take the round's steps; `take` said that the weights are there."""
        train, pool = self._config.train, self._moved.pool(task.round)
        weights = AtPoint(pool, self._moved.weights, self._base) if self._by_layers else None

        def place(theta: Tensor) -> None:
            if weights is None:
                pool.rebuild_model(self._parameters, self._moved.weights, theta)
            else:
                weights.theta = theta

        def find(batch: Batch) -> Slopes:
            return slopes(
                self._model, self._parameters, response_loss, batch, pool, checkpoint=self._checkpoint, weights=weights
            )

        plan, data = self._private(find, pool) if self._config.privacy.clip else self._plain(find, task.round)
        return local_walk(place, pool, plan, data, step=task.lr, beta1=train.beta1)

    def _fingerprint(self) -> str:
        """Round the weights to the model's type, in the model unless that is empty: they are the server's bits."""
        if self._by_layers:
            dtypes = {name: parameter.dtype for name, parameter in self._parameters.items()}
            return fingerprint((name, value.to(dtypes[name])) for name, value in self._moved.weights.items())
        self._moved.write(self._parameters)
        return fingerprint(self._parameters)

    def _plain(self, slopes: Find, round: int) -> tuple[Find, Iterator[Batch]]:
        """Say how a batch's slopes are found, and of which batches."""

        def find(batch: Batch) -> Slopes:
            cut = list(micro_batches(batch, self._micro_batch))
            parts = [slopes(part) for part in cut]
            weights = [int(response_tokens(part).sum()) for part in cut]
            total = max(1, sum(weights))
            return Slopes(
                sum(one.loss * weight for one, weight in zip(parts, weights, strict=True)) / total,
                sum((one.g * (weight / total) for one, weight in zip(parts, weights, strict=True)), torch.zeros(())),
            )

        return find, self._batches(round, self._config.train.local_steps)

    def _private(self, slopes: Find, pool: Pool) -> tuple[Find, Iterator[Batch]]:
        """The same with each example's slopes bounded, noise, and batches that nobody can foresee."""
        train, privacy, count = self._config.train, self._config.privacy, len(self._examples)
        size = min(train.batch_size, count)

        def find(batch: Batch) -> Slopes:
            rows = micro_batches(batch, 1) if batch else ()
            each = (slopes(row).g for row in rows)
            total = private_sum(each, privacy.clip, privacy.noise_multiplier, pool.size)
            return Slopes(0.0, total / size)  # no loss: a step that was skipped would tell something too

        drawn = poisson_sample(count, size / count, train.local_steps)
        return find, (collate(self._examples, indices) if indices else {} for indices in drawn)
