"""FedKSeed and FedKSeed-Pro (arXiv 2312.06353, algorithms 1 and 2): the model is a point in seed space.

The global model is theta, an array of K floats; W(theta) = W_0 + sum_k theta_k z_k. A node returns tau scalars, which
are a move of theta; moves are aggregated by a Flower strategy (`FedAvg` unless another is given), to which a node's
reply looks like any other: an array and a number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.config import Config
from fedtune_strategies.draws import MAX_ODDS, draw_seeds, sample, seed_key
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fleet import Fleet, address, decoded
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint, make_pool
from fedtune_strategies.strategies.aggregation import make_aggregator, moments, prepare, restore_moments, schedule
from fedtune_strategies.strategies.base import State, TuningStrategy, arrays_of, check_origin, log

# The published code clips a scalar to this before it enters the mean amplitude of its seed.
AMPLITUDE_LIMIT = 1000.0


class FedKSeed(TuningStrategy):
    """Tune in the space of K seeded directions by scalars alone.

    Parameters
    ----------
    config : Config
        The run configuration; `Config.fedkseed`, `Config.train` and `Config.strategy` are read.
    base : mapping of str to Tensor
        W_0 by canonical parameter name.
    inner : flwr.serverapp.strategy.Strategy, optional
        Aggregates the nodes' theta and asks nobody (``fraction_train=0``); that of ``strategy.aggregation`` by default.
    """

    def __init__(self, config: Config, base: Mapping[str, Tensor], inner: Strategy | None = None) -> None:
        self.config = config
        self.base = base
        self.pool = make_pool(config.fedkseed.pool, key=config.train.seed, size=config.fedkseed.seeds)
        self.inner = inner or make_aggregator(config.strategy)
        self.theta = np.zeros(config.fedkseed.seeds, dtype=np.float32)
        self.fingerprint = ""

    def summary(self) -> None:
        """Log what will be tuned and how."""
        settings = self.config.fedkseed
        log.info(
            "FedKSeed: K = %d %s seeds, tau = %d, eta = %g (%s), epsilon = %g, aggregated by %s",
            settings.seeds, settings.pool, settings.local_steps, settings.lr, settings.schedule, settings.eps,
            type(self.inner).__name__,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return theta = 0: the base model."""
        return arrays_of(theta=torch.zeros(self.config.fedkseed.seeds))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send theta, and the odds of the seeds if they differ, to the sampled nodes."""
        assert isinstance(grid, Fleet)
        self.theta = arrays["theta"].numpy()
        prepare(self.inner, self.lr(server_round), self.config.strategy.adaptivity)
        self.inner.configure_train(server_round, arrays, config, grid)
        task = protocol.SeedTask(
            round=server_round,
            theta=torch.from_numpy(self.theta),
            weights=torch.from_numpy(self.odds()),
            lr=self.lr(server_round),
        )
        payload = protocol.encode(task)
        nodes = grid.nodes
        count = max(self.config.strategy.min_replies, round(self.config.strategy.fraction_train * len(nodes)))
        chosen = sample((self.config.train.seed, server_round), list(nodes), min(count, len(nodes)))
        return [address(nodes[name], task.kind, payload, server_round) for name in chosen]

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check type, round, length and fingerprint of a reply."""
        if not isinstance(reply, protocol.SeedReply):
            raise ProtocolError(f"a node answered a seed task with a '{reply.kind}'.")
        check_origin(reply, round, self.fingerprint)
        if reply.scalars.shape != (self.config.fedkseed.local_steps,) or reply.scalars.dtype != torch.float32:
            raise ProtocolError(
                f"{reply.node} sent {tuple(reply.scalars.shape)} scalars of {reply.scalars.dtype}, not "
                f"{self.config.fedkseed.local_steps} of float32: the reply is left out."
            )
        if not torch.isfinite(reply.scalars).any():
            raise ProtocolError(f"{reply.node} had no step with a finite loss: the reply is left out.")
        return True

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Turn every reply into the theta that its node reached, and let the inner strategy aggregate those."""
        answers = sorted((decoded(reply.content, protocol.SeedReply) for reply in replies), key=lambda one: one.node)
        if not answers:
            return None, None
        odds = self.odds()
        moved = [self._moved(answer, odds) for answer in answers]
        arrays, metrics = self.inner.aggregate_train(server_round, moved)
        if arrays is None:
            return None, metrics
        for answer in answers:
            self.observe(self.draws(answer.node, server_round, odds), answer.scalars.numpy())
        self.theta = self._moved_towards(arrays["theta"].numpy(), server_round)
        return arrays_of(theta=torch.from_numpy(self.theta)), metrics

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Rebuild W(theta) from W_0."""
        theta = torch.from_numpy(arrays["theta"].numpy().copy())
        self.pool.rebuild_model(parameters, self.base, theta)
        self.fingerprint = fingerprint(parameters)
        return self.fingerprint

    def state(self) -> State:
        """Return theta and the aggregating strategy's momenta."""
        return State({"theta": torch.tensor(self.theta)} | moments(self.inner))

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up theta and the momenta."""
        restore_moments(self.inner, tensors)
        self.theta = tensors["theta"].numpy()
        return arrays_of(theta=tensors["theta"])

    def lr(self, round: int) -> float:
        """Return the step size of a round: ``fedkseed.lr`` times its schedule."""
        settings = self.config.fedkseed
        return settings.lr * schedule(settings, round, self.config.num_server_rounds)

    def odds(self) -> NDArray[np.int16]:
        """Return the relative odds of drawing each seed, int16 [K]; empty for uniform draws."""
        return np.empty(0, dtype=np.int16)

    def observe(self, seeds: NDArray[np.int64], scalars: NDArray[np.float32]) -> None:
        """Learn from the scalars of one node; uniform draws learn nothing."""

    def draws(self, node: str, round: int, odds: NDArray[np.int16]) -> NDArray[np.int64]:
        """Return the seeds that a node draws in a round, int64 [tau]."""
        settings = self.config.fedkseed
        return draw_seeds(seed_key(self.config, round, node), settings.local_steps, settings.seeds, odds)

    def _moved_towards(self, aggregated: NDArray[np.float64], round: int) -> NDArray[np.float32]:
        """Move theta by the server's step, and shrink it by weight decay as far as the round's step size goes."""
        settings = self.config.strategy
        theta = self.theta.astype(np.float64)
        decay = settings.weight_decay * self.lr(round) / self.config.fedkseed.lr
        return (theta - decay * theta + settings.server_lr * (aggregated - theta)).astype(np.float32)

    def _moved(self, answer: protocol.SeedReply, odds: NDArray[np.int16]) -> Message:
        scalars = np.nan_to_num(answer.scalars.numpy().astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        theta = self.theta.astype(np.float64)
        np.subtract.at(theta, self.draws(answer.node, answer.round, odds), self.lr(answer.round) * scalars)
        weight = answer.num_examples if self.config.strategy.weighting == "examples" else 1
        metrics: dict[str, MetricRecordValues] = {
            "num-examples": weight,
            "train/loss": answer.loss,
            "train/skipped": int((~torch.isfinite(answer.scalars)).sum()),
        }
        content = RecordDict({"arrays": arrays_of(theta=torch.from_numpy(theta)), "metrics": MetricRecord(metrics)})
        return Message(content, dst_node_id=0, message_type="train")


class FedKSeedPro(FedKSeed):
    """FedKSeed whose nodes draw seeds by the amplitude that their scalars had (arXiv 2312.06353, section 4.3).

    The odds are a softmax of the min-max normalised mean amplitude, so the likeliest seed is at most
    exp(1 / temperature) times as likely as the unlikeliest. With ``fedkseed.pro-mean = "faithful"`` every history
    starts with the published code's artificial 0.0, which halves a once-drawn seed and puts never-drawn seeds last;
    with ``"counted"`` the mean is over true draws and a never-drawn seed counts as average.
    """

    def __init__(self, config: Config, base: Mapping[str, Tensor], inner: Strategy | None = None) -> None:
        super().__init__(config, base, inner)
        self.amplitude = np.zeros(config.fedkseed.seeds, dtype=np.float64)
        self.count = np.zeros(config.fedkseed.seeds, dtype=np.int64)

    def odds(self) -> NDArray[np.int16]:
        """Return the relative odds of drawing each seed, int16 [K]; empty before the first reply."""
        if not self.count.any():
            return np.empty(0, dtype=np.int16)
        mean = self.mean_amplitude()
        span = mean.max() - mean.min()
        scaled = (mean - mean.min()) / span if span > 0 else np.zeros_like(mean)
        likelihood = np.exp((scaled - 1.0) / self.config.fedkseed.pro_temperature)
        return np.maximum(1, np.rint(MAX_ODDS * likelihood)).astype(np.int16)

    def mean_amplitude(self) -> NDArray[np.float64]:
        """Return Lambda, the mean absolute scalar of each seed, clipped at `AMPLITUDE_LIMIT`, float64 [K]."""
        if self.config.fedkseed.pro_mean == "faithful":
            return self.amplitude / (self.count + 1)
        drawn = self.count > 0
        unseen = self.amplitude[drawn].sum() / self.count[drawn].sum()
        return np.where(drawn, self.amplitude / np.maximum(self.count, 1), unseen)

    def observe(self, seeds: NDArray[np.int64], scalars: NDArray[np.float32]) -> None:
        """Add the clipped amplitudes of one node to the history of its seeds."""
        finite = np.isfinite(scalars)
        np.add.at(self.amplitude, seeds[finite], np.minimum(np.abs(scalars[finite], dtype=np.float64), AMPLITUDE_LIMIT))
        np.add.at(self.count, seeds[finite], 1)

    def state(self) -> State:
        """Return theta and the amplitudes' history."""
        history = {"amplitude": torch.tensor(self.amplitude), "count": torch.tensor(self.count)}
        return State(super().state().tensors | history)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up theta and the amplitudes' history."""
        self.amplitude, self.count = tensors["amplitude"].numpy(), tensors["count"].numpy()
        return super().restore(tensors, load)
