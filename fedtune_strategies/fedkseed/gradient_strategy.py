"""FedKSeed with the seed-space gradient: the same W(theta) = W_0 + sum_p sum_k theta_{p,k} z_{p,k}, by first order.

A zeroth-order step learns one slope for two forward passes; one backward pass gives the slopes along all K directions
of a pool, by the adjoint of the transform that rebuilds weights. So every round has a fresh pool: a node walks some
steps in it from theta = 0, and sends the point that it reached at one bit a coefficient. The mean of these points is
rounded to a few bits *before* it moves the model, so that the server and every node have the same bits; what rounding
leaves is forgotten, since it is nearly orthogonal to the next pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.aggregators import robust_aggregator
from fedtune_strategies.errors import DivergenceError, FingerprintError, ProtocolError
from fedtune_strategies.fedkseed.accountant import PrivacySpent
from fedtune_strategies.fedkseed.config import GradientRunConfig
from fedtune_strategies.fedkseed.messages import GradientReply, GradientTask, GradientWeights
from fedtune_strategies.fedkseed.moved import Moved
from fedtune_strategies.fedkseed.screening import running_amplitude
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import Deferred, address, decoded
from fedtune_strategies.seed_gradient import decode, default_step, encode, level_counts, packed_bytes
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategy import (
    State,
    TuningStrategy,
    arrays_of,
    check_origin,
    for_aggregation,
    log,
    mean_loss,
    sampled,
    share_of_step,
    shares,
)

Point = tuple[Tensor, float]
"""The packed levels of a round's theta, and their unit."""


class SeedGradient(TuningStrategy):
    """Tune in the space of seeded directions by gradients, a fresh pool of directions in each round."""

    def __init__(self, config: GradientRunConfig, base: Mapping[str, Tensor]) -> None:
        self.config = config
        self.inner = robust_aggregator(config.strategy)
        self.moved = Moved(config, base)
        self.points: list[Point] = []
        self.held: dict[str, int] = {}  # points that each node holds, as its last reply showed
        self.forgot: set[str] = set()  # nodes that have shown since then that they need them all again
        self.offered: set[str] = set()  # nodes that have not answered since they were sent W_r whole
        self.unit = 0.0  # running median of the nodes' units
        self.kept = 0.0  # share of the newest mean's energy that rounding kept
        self.fingerprint = ""
        self.spent = PrivacySpent(config)
        count = sum(tensor.numel() for tensor in base.values())
        self.eta = config.train.lr or default_step(count, config.fedkseed.seeds)

    def summary(self) -> None:
        """Log what will be tuned and how, and why where the estimator chose."""
        self.spent.check()
        own, train = self.config.fedkseed, self.config.train
        chosen = "as set" if train.lr else "by the model's size and K"
        log.info(
            "FedKSeed by gradient: K = %d %s directions, fresh each round (a fixed pool saturates), tau = %d, a step "
            "changes the weights by %.3g of their root mean square (%s), %d bit up (a byte does more as K), "
            "%d bits down (every holder moves by the same rounded point), aggregated by %s",
            own.seeds, own.pool, train.local_steps, self.eta, chosen, own.up_bits, own.down_bits,
            type(self.inner).__name__,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return theta = 0 of the first pool: the base model."""
        return arrays_of(theta=torch.zeros(self.config.fedkseed.seeds))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the sampled nodes the points that they lack."""
        assert isinstance(grid, Fleet)
        nodes = grid.nodes
        chosen = sampled(self.config, list(nodes), server_round)
        since = {name: -1 if name in self.forgot else self.held.get(name, 0) for name in chosen}
        # Once: where that came to nothing, points are slower and surer.
        new = [name for name in chosen if name not in self.offered]
        whole = {name for name in new if self.moved.whole_is_less(server_round - 1 - max(0, since[name]))}
        self.offered |= whole
        since |= dict.fromkeys(whole, server_round - 1)
        # Most nodes lack the same: what they are sent is encoded once.
        parts = list(self.moved.parts()) if whole else []
        lr = self.eta * share_of_step(config)
        payloads = {held: protocol.encode(self._task(server_round, held, lr)) for held in set(since.values())}
        for name in chosen:
            for part in parts if name in whole else ():
                yield Deferred(nodes[name].id, GradientWeights.kind, part, server_round)
            yield address(nodes[name].id, GradientTask.kind, payloads[since[name]], server_round)

    def note_asked(self, nodes: Mapping[str, int]) -> None:
        """Count what privacy has cost each node."""
        self.spent.note(nodes)

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check type, round, starting weights and size of a reply."""
        if isinstance(reply, protocol.StateMissing):
            log.info("%s holds the base model alone (its worker was restarted): sending it all points", reply.node)
            self.forgot.add(reply.node)
            return False
        if isinstance(reply, protocol.Ack) and reply.node in self.offered:
            return False
        if not isinstance(reply, GradientReply):
            raise ProtocolError(f"a node answered a gradient task with a '{reply.kind}'.")
        try:
            check_origin(reply, round, self.fingerprint)
        except FingerprintError:
            self.forgot.add(reply.node)  # the next task starts from the base model
            raise
        self._theta(reply)
        self.offered.discard(reply.node)
        return True

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the inner strategy average the nodes' points; round the mean, and make it the round's point."""
        answers = sorted((decoded(reply.content, GradientReply) for reply in replies), key=lambda one: one.node)
        if not answers:
            return None, None
        self.held |= {answer.node: server_round - 1 for answer in answers}
        self.forgot -= {answer.node for answer in answers}
        # No node moves a coordinate by more than the median node does: a large unit would outweigh all others.
        self.unit = running_amplitude(self.unit, [answer.unit for answer in answers])
        weights = shares(answers, self.config.strategy.weighting)
        replies = [
            for_aggregation(self._arrays(answer), weight, answer.skipped)
            for answer, weight in zip(answers, weights, strict=True)
        ]
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        if arrays is None:
            return None, metrics
        mean = self.config.strategy.server_lr * arrays["theta"].numpy().astype(np.float64)
        levels, unit = encode(mean.astype(np.float32), self.config.fedkseed.down_bits)
        self.points.append((levels, unit))
        theta = self._decoded(self.points[-1])
        length = float(np.linalg.norm(mean))
        self.kept = float(1 - np.square(theta - mean).sum() / length**2) if length else 0.0
        if metrics is not None:
            metrics.update({**mean_loss(answers, weights), **self.spent.metrics()})
            metrics.update({"move/rms": float(np.linalg.norm(theta)), "move/kept": self.kept})
        return arrays_of(theta=torch.from_numpy(theta)), metrics

    def skip(self, round: int, arrays: ArrayRecord) -> ArrayRecord:
        """Stay where the model is: the round had its own pool all the same."""
        self.points.append(encode(np.zeros(self.config.fedkseed.seeds, np.float32), self.config.fedkseed.down_bits))
        self.kept = 0.0
        return self.initial_arrays()

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Move the weights by the points that are not in them yet, and write them; others stay as they are."""
        self.moved.follow([self._decoded(point) for point in self.points[self.moved.rounds :]])
        tuned = {name: parameters[name] for name in self.moved.weights}
        self.moved.write(tuned)
        self.fingerprint = fingerprint(tuned)
        return self.fingerprint

    def state(self) -> State:
        """Return the running unit and what nodes hold; the newest point is a file, which will not change any more.

        With them what the status page shows of the point: its unit, how many coefficients are at each level, and how
        much rounding kept.
        """
        tensors = {f"held/{node}": torch.tensor(rounds) for node, rounds in sorted(self.held.items())}
        levels, unit = self.points[-1]
        point = {"levels": levels, "unit": torch.tensor(unit, dtype=torch.float64)}
        counts = level_counts(levels, self.config.fedkseed.down_bits, self.config.fedkseed.seeds)
        shown = {"point/counts": torch.from_numpy(counts), "point/unit": point["unit"],
                 "point/kept": torch.tensor(self.kept, dtype=torch.float64)}  # fmt: skip
        own = self.spent.state() | {"unit": torch.tensor(self.unit, dtype=torch.float64)}
        return State(tensors | own | shown, {f"point-{len(self.points)}": point})

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up what `state` returned."""
        self.unit = float(tensors["unit"])
        self.spent.restore(tensors)
        self.held = {key.removeprefix("held/"): int(v) for key, v in tensors.items() if key.startswith("held/")}
        while (point := load(f"point-{len(self.points) + 1}")) is not None:
            self.points.append((point["levels"].clone(), float(point["unit"])))  # no mapping for each of many rounds
        return arrays_of(theta=torch.from_numpy(self._decoded(self.points[-1])))

    def _task(self, round: int, held: int, lr: float) -> GradientTask:
        new = self.points[max(0, held) :]
        width = packed_bytes(self.config.fedkseed.seeds, self.config.fedkseed.down_bits)
        levels = torch.stack([levels for levels, _ in new]) if new else torch.empty(0, width, dtype=torch.uint8)
        units = torch.tensor([unit for _, unit in new], dtype=torch.float32)
        return GradientTask(round, held, levels, units, lr)

    def _decoded(self, point: Point) -> NDArray[np.float32]:
        return decode(*point, self.config.fedkseed.down_bits, self.config.fedkseed.seeds)

    def _theta(self, reply: GradientReply) -> NDArray[np.float32]:
        """Return the point that a node reached, float32 [K]."""
        own = self.config.fedkseed
        if not 0 < reply.unit < math.inf:
            raise DivergenceError(f"{reply.node} made no step with a finite loss: the reply is left out.")
        return decode(reply.levels, min(reply.unit, self.unit or reply.unit), own.up_bits, own.seeds)

    def _arrays(self, answer: GradientReply) -> ArrayRecord:
        return arrays_of(theta=torch.from_numpy(self._theta(answer).astype(np.float64)))
