"""A method whose global model is a set of tensors: what nodes made of them is averaged by a Flower strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtune_strategies.aggregators import robust_aggregator
from fedtune_strategies.blocks.codecs import decode
from fedtune_strategies.blocks.train import apply_delta
from fedtune_strategies.blocks.uploads import fits
from fedtune_strategies.errors import DivergenceError, ProtocolError
from fedtune_strategies.fedavg.messages import ArraysReply, ArraysTask
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

_MODEL = "model"


class ArraysStrategy(TuningStrategy):
    """Send tensors to sampled nodes, and average what they made of them.

    Federated averaging (McMahan et al., arXiv 1602.05629) of any tensors: all parameters, some of
    them, or an adapter's. A node answers an `ArraysTask` with an `ArraysReply`: the change of each, coded as
    ``train.upload`` says.

    Parameters
    ----------
    config : Config
        The run configuration; its ``strategy`` is a `RobustConfig`, and ``train`` a `LocalTrainConfig` unless
        `step_size` is overridden.
    initial : mapping of str to Tensor
        The tensors before the first round, by canonical parameter name. They are held and averaged in float32.
    inner : flwr.serverapp.strategy.Strategy, optional
        What aggregates the replies, one that remembers nothing from round to round; by default that of
        ``strategy.aggregation``.
    """

    def __init__(self, config: Any, initial: Mapping[str, Tensor], inner: Strategy | None = None) -> None:
        self.config = config
        self.inner = inner or robust_aggregator(config.strategy)
        self.upload: str = getattr(config.train, "upload", "float32")
        self.current = {name: tensor.to(torch.float32) for name, tensor in sorted(initial.items())}
        self.fingerprint = ""  # of the tensors on which the round's nodes start

    def summary(self) -> None:
        """Log what will be tuned and how."""
        count = sum(value.numel() for value in self.current.values())
        log.info(
            "%s: %d parameters in %d tensors, aggregated by %s",
            type(self).__name__, count, len(self.current), type(self.inner).__name__,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return the tensors before the first round."""
        return arrays_of(**self.current)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the tensors to the sampled nodes."""
        assert isinstance(grid, Fleet)
        self.fingerprint = fingerprint(self.current)
        nodes = grid.nodes
        # One encoding for all nodes: the tensors are the same for everybody, and may be the whole model.
        payload = protocol.encode(ArraysTask(server_round, self.current, self.step_size(config)))
        return [
            address(nodes[name].id, ArraysTask.kind, payload, server_round)
            for name in sampled(self.config, list(nodes), server_round)
        ]

    def step_size(self, settings: ConfigRecord) -> float:
        """Return the size of a round's local steps."""
        return float(self.config.train.lr * share_of_step(settings))

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check type, round, starting weights, names, shapes and finiteness of a reply."""
        if not isinstance(reply, ArraysReply):
            raise ProtocolError(f"a node answered an arrays task with a '{reply.kind}'.")
        check_origin(reply, round, self.fingerprint)
        if not all(value.isfinite().all() for value in self.changes(reply).values()):
            raise DivergenceError(f"{reply.node} sent tensors that are not finite: the reply is left out.")
        return True

    def changes(self, reply: ArraysReply) -> dict[str, Tensor]:
        """Return how a reply says that each tensor changed; raises `ProtocolError` where it says something else.

        Override it where nodes send changes in a form of your own.
        """
        # Before anything is decoded: a few coded bytes may claim any shape.
        if not fits(reply.arrays, self.current, self.upload):
            raise ProtocolError(f"{reply.node} sent other tensors than it was given: the reply is left out.")
        return decode(reply.arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the inner strategy average the replies, in the order of the nodes' names."""
        # By name, not by arrival: a mean of floats depends on the order, and a replay must end in the same bits.
        answers = sorted((decoded(reply.content, ArraysReply) for reply in replies), key=lambda a: a.node)
        weights = shares(answers, self.config.strategy.weighting)
        replies = [
            for_aggregation(self._arrays(answer), weight, answer.skipped)
            for answer, weight in zip(answers, weights, strict=True)
        ]
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        if arrays is not None:
            self._take(arrays)
        if metrics is not None:
            metrics.update(mean_loss(answers, weights))
        return arrays, metrics

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Copy the tensors into the parameters of the same names; the others stay as they are."""
        with torch.no_grad():
            for name, value in self.current.items():
                parameters[name].copy_(value)
        return fingerprint(parameters)

    def state(self) -> State:
        """Return the tensors, as one file a round."""
        return State(files={_MODEL: self.current})

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up the newest file of tensors."""
        self.current = load(_MODEL) or self.current
        return self.initial_arrays()

    def _take(self, arrays: ArrayRecord) -> None:
        self.current = {name: torch.from_numpy(arrays[name].numpy()).to(torch.float32) for name in self.current}

    def _arrays(self, answer: ArraysReply) -> ArrayRecord:
        # Nodes send changes, which code well; Flower's strategies average the tensors that these lead to.
        return arrays_of(**apply_delta(self.current, self.changes(answer)))
