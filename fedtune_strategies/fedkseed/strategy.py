"""FedKSeed (arXiv 2312.06353, algorithm 1): the model is a point in seed space.

The global model is theta, an array of K floats; W(theta) = W_0 + sum_k theta_k z_k. A node returns tau scalars, which
are a move of theta; moves are aggregated by a Flower strategy (`FedAvg` unless another is given), to which a node's
reply looks like any other: an array and a number of examples.

Each round's move of theta is rounded before it is made, and what rounding left is added to the next one. So theta is
a whole number of units, and its change since any round goes down exactly in few bytes.

With ``fedkseed.pool-every`` a pool that has served its rounds is closed: its theta stays in the model as it is, and a
fresh pool begins at theta = 0. To Flower the model is the theta of the newest pool alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.errors import DivergenceError, ProtocolError
from fedtune_strategies.fedkseed.accountant import PrivacySpent
from fedtune_strategies.fedkseed.aggregators import (
    forget_moments,
    make_aggregator,
    moments,
    prepare,
    restore_moments,
    set_step,
)
from fedtune_strategies.fedkseed.config import FedKSeedRunConfig
from fedtune_strategies.fedkseed.messages import SeedReply, SeedTask
from fedtune_strategies.fedkseed.packing import SCALAR_TYPES, pack, read_scalars
from fedtune_strategies.fedkseed.pools import pool_number, rebuild
from fedtune_strategies.fedkseed.screening import amplitude, clipped, in_line, running_amplitude
from fedtune_strategies.fedkseed.seed_draws import check_secret, draw_seeds, odds_of_levels, seed_key
from fedtune_strategies.fedkseed.versions import LARGEST, Versions, round_move, unit_of
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import address, decoded
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
from fedtune_strategies.zeroth_order.calibrate import default_distance

# Share of error in a node's slopes above which less than half of their mean square is signal.
NOISE_LIMIT = 0.7
# Scalars from which on a reply's median says how large a node's slopes are.
FEWEST_SCALARS = 8


class FedKSeed(TuningStrategy):
    """Tune in the space of K seeded directions by scalars alone; `inner` aggregates the nodes' theta."""

    def __init__(self, config: FedKSeedRunConfig, base: Mapping[str, Tensor], inner: Strategy | None = None) -> None:
        self.config = config
        self.takes_late = config.strategy.late > 0
        self.base = base
        self.inner = inner or make_aggregator(config.strategy)
        self.closed: list[NDArray[np.float32]] = []
        self.theta = np.zeros(config.fedkseed.seeds, dtype=np.float32)
        # What rounding left of past moves, added to the next: theta stays a whole number of units, and nothing is lost.
        self.carry = np.zeros(config.fedkseed.seeds, dtype=np.float32)
        self.eta = config.train.lr  # 0 until the first round has found it
        self.eps = config.fedkseed.eps or default_distance(base.values())
        # Which theta each node holds, and the last ones themselves: a change goes down, not the whole of theta.
        self.versions = Versions()
        self.amplitude = 0.0
        self.spent = PrivacySpent(config)
        self.fingerprint, self.last_fingerprint = "", ""
        self.share = 1.0  # of the step size, in the current round
        # What a reply that comes a round late was made with.
        self.last_odds, self.last_lr = np.empty(0, dtype=np.int16), 0.0
        self.history = (*self.history, *(("last_odds", "last_lr") if self.takes_late else ()))

    def summary(self) -> None:
        """Log what will be tuned and how."""
        self.spent.check()
        settings, train = self.config.fedkseed, self.config.train
        log.info(
            "FedKSeed: K = %d %s seeds, tau = %d, eta = %s (%s), epsilon = %g, aggregated by %s",
            settings.seeds, settings.pool, train.local_steps, self.eta or "found in round 1", train.lr_schedule,
            self.eps, type(self.inner).__name__,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return theta = 0 in the first pool: the base model."""
        return arrays_of(theta=torch.zeros(self.config.fedkseed.seeds))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the sampled nodes what changed in theta since their last task, and the odds of the seeds."""
        assert isinstance(grid, Fleet)
        nodes = grid.nodes
        self.theta = arrays["theta"].numpy()
        self.share, self.eta = share_of_step(config), cast(float, config.get("eta", self.eta))
        prepare(self.inner)
        # Flower's strategy sees the round as its own would be; its messages are not used, its bookkeeping is.
        self.inner.configure_train(server_round, arrays, config, grid)
        self.versions.add(
            server_round - 1, [np.rint(row / self.unit).astype(np.int32) for row in (*self.closed, self.theta)]
        )
        chosen = sampled(self.config, list(nodes), server_round)
        # Nodes that hold the same version get the same bytes: a task is encoded once for each version, not for each
        # node.
        since = {name: self.versions.since(name) for name in chosen}
        payloads = {version: protocol.encode(self._task(server_round, version)) for version in set(since.values())}
        kind = SeedTask.kind
        return [address(nodes[name].id, kind, payloads[since[name]], server_round) for name in chosen]

    def note_asked(self, nodes: Mapping[str, int]) -> None:
        """Count what privacy has cost each node: with its task it is spent, whether or not a reply comes."""
        self.spent.note(nodes)

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check type, round, length and fingerprint of a reply."""
        if isinstance(reply, protocol.StateMissing):
            log.info("%s does not hold the last theta (its worker was restarted): sending it in full", reply.node)
            self.versions.forget(reply.node)
            return False
        if not isinstance(reply, SeedReply):
            raise ProtocolError(f"a node answered a seed task with a '{reply.kind}'.")
        check_origin(reply, round, self.fingerprint)
        self._check_scalars(reply)
        self.versions.hold(reply.node, round - 1)
        return True

    def accept_late(self, round: int, reply: protocol.Message) -> bool:
        """Let a reply of the round before count, if ``strategy.late`` is above 0: scalars commute."""
        if not isinstance(reply, SeedReply) or reply.round not in (round, round - 1):
            return super().accept_late(round, reply)
        if reply.round == round:  # its round is not over
            return self.accept(round, reply)
        if not self.config.strategy.late or pool_number(self.config, round) != pool_number(self.config, round - 1):
            return super().accept_late(round, reply)
        check_origin(reply, round - 1, self.last_fingerprint)
        self._check_scalars(reply)
        self.versions.hold(reply.node, reply.round - 1)
        return True

    def _check_scalars(self, reply: SeedReply) -> None:
        settings, steps = self.config.fedkseed, self.config.train.local_steps
        if reply.scalars.shape != (steps,) or reply.scalars.dtype != SCALAR_TYPES[settings.scalar_bits]:
            raise ProtocolError(
                f"{reply.node} sent {tuple(reply.scalars.shape)} scalars of {reply.scalars.dtype}, not "
                f"{steps} of {SCALAR_TYPES[settings.scalar_bits]}: the reply is left out."
            )
        check_secret(reply.key)
        if not 0 < reply.lr < math.inf:
            raise DivergenceError(f"{reply.node} found no step size: its losses are not finite. The reply is left out.")
        scalars = read_scalars(reply.scalars, reply.unit)
        if not np.isfinite(scalars).any():
            raise DivergenceError(f"{reply.node} had no step with a finite loss: the reply is left out.")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Turn every reply into the theta that its node reached, and let the inner strategy aggregate those."""
        answers = sorted((decoded(reply.content, SeedReply) for reply in replies), key=lambda one: one.node)
        # By name, not by arrival: sums of floats depend on their order, and a replay must end in the same bits.
        answers = self._in_line(answers)
        if not answers:
            return None, None
        self._calibrate(answers)
        set_step(self.inner, self.lr, self.config.strategy.adaptivity)
        # A reply belongs to the odds and the step size of the round that asked for it, which may be the one before.
        drawn = {server_round: (self.odds(), self.lr), server_round - 1: (self.last_odds, self.last_lr)}
        received = [read_scalars(answer.scalars, answer.unit) for answer in answers]
        amplitudes = [amplitude(one) for one in received]
        # One node's amplitude cannot raise the limit that it is clipped at: the median is the round's, not the reply's.
        limit = self._limit(float(np.median(amplitudes)))
        scalars = [clipped(one, limit) for one in received]
        weights = [
            share * (self.config.strategy.late if answer.round < server_round else 1)
            for answer, share in zip(answers, shares(answers, self.config.strategy.weighting), strict=True)
        ]
        moved = [
            self._moved(answer, one, *drawn[answer.round], weight)
            for answer, one, weight in zip(answers, scalars, weights, strict=True)
        ]
        # To Flower each reply is a theta [K] with a weight: its own aggregators (FedAvg, median, Krum, Adam ...) work
        # as they are.
        arrays, metrics = self.inner.aggregate_train(server_round, moved)
        if arrays is None:
            return None, metrics
        if metrics is not None:
            metrics.update({**mean_loss(answers, weights), **self.spent.metrics()})
        self.amplitude = running_amplitude(self.amplitude, amplitudes)
        for answer, one in zip(answers, scalars, strict=True):
            self.observe(self.draws(answer, drawn[answer.round][0]), one)
        self.last_odds, self.last_lr = drawn[server_round]
        self._move(arrays["theta"].numpy())
        return self._after(server_round), metrics

    def used(self) -> dict[str, float]:
        """Return the step size that the first round found: without some of its nodes it would be another one."""
        return {"eta": self.eta}

    def skip(self, round: int, arrays: ArrayRecord) -> ArrayRecord:
        """Close the pool where the round was its last."""
        return self._after(round)

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Rebuild W(theta) from W_0; parameters that are not tuned stay as they are."""
        tuned = {name: parameters[name] for name in self.base}
        rebuild(self.config, [*self.closed, arrays["theta"].numpy().copy()], tuned, self.base)
        self.fingerprint, self.last_fingerprint = fingerprint(tuned), self.fingerprint
        return self.fingerprint

    def state(self) -> State:
        """Return theta, what rounding left of its moves, the running amplitude, and the inner strategy's momenta.

        Theta of a closed pool is a file: it will not change any more.
        """
        own = {"theta": self.theta, "carry": self.carry, "amplitude": np.float64(self.amplitude)}
        own |= {"last_odds": self.last_odds, "last_lr": np.float64(self.last_lr)} if self.takes_late else {}
        own |= {"eta": np.float64(self.eta)}
        files = {f"pool-{len(self.closed) - 1}": {"theta": torch.from_numpy(row)} for row in self.closed[-1:]}
        tensors = {name: torch.tensor(value) for name, value in own.items()}
        return State(tensors | self.spent.state() | moments(self.inner), files)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up what `state` returned."""
        restore_moments(self.inner, tensors)
        while (closed := load(f"pool-{len(self.closed)}")) is not None:
            self.closed.append(closed["theta"].numpy())
        self.theta, self.carry = tensors["theta"].numpy(), tensors["carry"].numpy()
        self.amplitude = float(tensors["amplitude"])
        if self.takes_late:
            self.last_odds, self.last_lr = tensors["last_odds"].numpy(), float(tensors["last_lr"])
        self.eta = float(tensors["eta"])
        self.spent.restore(tensors)
        return arrays_of(theta=tensors["theta"])

    @property
    def lr(self) -> float:
        """Step size of the current round: eta times its schedule."""
        return self.eta * self.share

    @property
    def unit(self) -> float:
        """Unit of theta."""
        return unit_of(self.eta) if self.eta else 1.0

    def levels(self) -> NDArray[np.int32]:
        """Return which of the odds each seed has, int32 [K]; empty for uniform draws."""
        return np.empty(0, dtype=np.int32)

    def odds(self) -> NDArray[np.int16]:
        """Return the relative odds of drawing each seed, int16 [K]; empty for uniform draws."""
        return odds_of_levels()[self.levels()]

    def observe(self, seeds: NDArray[np.int64], scalars: NDArray[np.float32]) -> None:
        """Learn from the scalars of one node; uniform draws learn nothing."""

    def next_pool(self) -> None:
        """Close the pool: its theta stays, and all that is known of its directions is forgotten.

        What rounding left of its last move goes too: below 1 % of that move's largest entry at 8 bits.
        """
        self.closed.append(self.theta)
        self.theta, self.carry = np.zeros_like(self.theta), np.zeros_like(self.carry)
        forget_moments(self.inner)
        log.info("pool %d has served its rounds: the next one begins", len(self.closed))

    def draws(self, answer: SeedReply, odds: NDArray[np.int16]) -> NDArray[np.int64]:
        """Return the seeds that a reply's node drew in its round, int64 [tau]."""
        steps, seeds = self.config.train.local_steps, self.config.fedkseed.seeds
        return draw_seeds(seed_key(self.config, answer.round, answer.node, answer.key), steps, seeds, odds)

    def _task(self, round: int, held: int) -> SeedTask:
        since, change = self.versions.change(held, round - 1)
        levels = self.levels()
        return SeedTask(
            round=round,
            since=since,
            change=change,
            unit=self.unit,
            levels=pack(levels) if levels.size else torch.empty(0, dtype=torch.uint8),
            odds=torch.from_numpy(odds_of_levels() if levels.size else odds_of_levels()[:0]),
            lr=self.lr,
            eps=self.eps,
            limit=self._limit(self.amplitude),
        )

    def _in_line(self, answers: list[SeedReply]) -> list[SeedReply]:
        """Leave out replies whose scalars are far larger or smaller than the round's median reply."""
        steps, factor = self.config.train.local_steps, self.config.fedkseed.outlier
        if not answers or steps < FEWEST_SCALARS:  # the median of a few scalars is anything
            return answers
        inside = in_line([amplitude(read_scalars(one.scalars, one.unit)) for one in answers], factor)
        for answer in (one for one, ok in zip(answers, inside, strict=True) if not ok):
            log.warning(
                "%s sent scalars more than %g times above or below the round's median ('fedkseed.outlier'): the reply "
                "is left out", answer.node, factor, extra={"node": answer.node},
            )  # fmt: skip
        return [one for one, ok in zip(answers, inside, strict=True) if ok]

    def _calibrate(self, answers: list[SeedReply]) -> None:
        """In the first round: take the medians of what the nodes found, and say where slopes are mostly error."""
        noise = {answer.node: answer.noise for answer in answers if math.isfinite(answer.noise)}
        for node in [node for node, share in noise.items() if share > NOISE_LIMIT]:
            log.warning(
                "%s: the signal in its scalars is below the noise: %.0f %% of their size is error; "
                "set 'fedkseed.eps' higher, or 'model.dtype' to \"float32\"",
                node, 100 * noise[node],
            )  # fmt: skip
        if not self.eta:
            self.eta = float(np.median([answer.lr for answer in answers]))
            log.info("found by %d nodes: train.lr = %.3g", len(answers), self.eta)

    def _after(self, round: int) -> ArrayRecord:
        """Close the pool where a round was its last; return theta."""
        if pool_number(self.config, round + 1) > len(self.closed):
            self.next_pool()
        return arrays_of(theta=torch.from_numpy(self.theta))

    def _move(self, aggregated: NDArray[np.float64]) -> None:
        """Move theta by the server's step, less weight decay, both rounded; what rounding leaves moves next time."""
        settings = self.config.strategy
        theta = self.theta.astype(np.float64)
        decay = self.config.train.weight_decay * self.share
        # theta moves towards the aggregate, decays, and takes up what rounding left; then the move is rounded to units.
        move = settings.server_lr * (aggregated - theta) - decay * theta + self.carry
        steps = np.rint(theta / self.unit) + round_move(move / self.unit, self.config.fedkseed.theta_bits)
        if beyond := int((np.abs(steps) > LARGEST).sum()):
            log.warning(
                "%d coordinates of theta stay at the end of their range, %.3g: 'fedkseed.pool-every' begins fresh ones",
                beyond, LARGEST * self.unit,
            )  # fmt: skip
        self.theta = (np.clip(steps, -LARGEST, LARGEST) * self.unit).astype(np.float32)
        self.carry = (move - (self.theta - theta)).astype(np.float32)

    def _limit(self, amplitude: float) -> float:
        return self.config.fedkseed.clip * amplitude or math.inf

    def _moved(
        self, answer: SeedReply, scalars: NDArray[np.float32], odds: NDArray[np.int16], lr: float, weight: float
    ) -> Message:
        """Turn a reply into the theta that its node reached, as a reply to a Flower strategy."""
        seeds, theta = self.draws(answer, odds), self.theta.astype(np.float64)
        # The node's walk as arithmetic: theta[s_t] -= lr g_t, each seed as often as it was drawn. A step
        # whose loss was not finite made no move there, and makes none here.
        np.subtract.at(theta, seeds, lr * np.nan_to_num(scalars.astype(np.float64)))
        return for_aggregation(arrays_of(theta=torch.from_numpy(theta)), weight, int(np.isnan(scalars).sum()))
