"""FedZO (arXiv 2201.09531): nodes take zeroth-order steps, all parameters are averaged; nodes find the step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from fedtune_strategies.errors import DivergenceError
from fedtune_strategies.fedavg.config import FedZORunConfig
from fedtune_strategies.fedavg.messages import ZerothReply
from fedtune_strategies.fedavg.strategy import ArraysStrategy
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import decoded
from fedtune_strategies.strategy import State, log, share_of_step


class FedZO(ArraysStrategy):
    """Average all parameters after zeroth-order steps."""

    def __init__(self, config: FedZORunConfig, initial: Mapping[str, Tensor]) -> None:
        super().__init__(config, initial)
        self.eta: float = config.train.lr  # 0 until the first round has found it

    def step_size(self, settings: ConfigRecord) -> float:
        """Return the size of a round's steps; 0 where each node is to find one."""
        self.eta = cast(float, settings.get("eta", self.eta))
        return self.eta * share_of_step(settings)

    def used(self) -> dict[str, float]:
        """Return eta: what a later round's steps are shares of."""
        return {"eta": self.eta}

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check the step size too."""
        if isinstance(reply, ZerothReply) and not 0 < reply.lr < math.inf:
            raise DivergenceError(f"{reply.node} found no step size: its losses are not finite. The reply is left out.")
        return super().accept(round, reply)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, and after the first round take the median of what the nodes found."""
        replies = list(replies)
        if replies and not self.eta:
            self.eta = float(np.median([decoded(reply.content, ZerothReply).lr for reply in replies]))
            log.info("found by %d nodes: train.lr = %.3g", len(replies), self.eta)
        return super().aggregate_train(server_round, replies)

    def state(self) -> State:
        """Return the tensors and the step size."""
        return State({"eta": torch.tensor(self.eta, dtype=torch.float64)}, super().state().files)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up what `state` returned."""
        self.eta = float(tensors["eta"])
        return super().restore(tensors, load)
