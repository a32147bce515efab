"""A node's side of federated averaging: train what the task brings, and send back how it changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.codec_config import UPLOADS, Codec
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.train import train_block
from fedtune_strategies.blocks.uploads import encode_with_feedback
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedavg.messages import ArraysReply, ArraysTask, ZerothReply
from fedtune_strategies.language.adapters import add_adapters
from fedtune_strategies.language.loss import finite_mean, response_loss
from fedtune_strategies.memory import private_peak
from fedtune_strategies.method import NodeContext
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import Pool, fingerprint, make_pool, tuned_parameters
from fedtune_strategies.shared_random import stream
from fedtune_strategies.zeroth_order import check_steps, local_steps
from fedtune_strategies.zeroth_order.calibrate import DIRECTIONS, calibrate, default_distance


class FedAvgClient:
    """Trains all parameters by AdamW."""

    def __init__(self, context: NodeContext) -> None:
        self._config: Any = context.config
        self._model = context.model
        self._name, self._examples = context.name, context.examples
        self._checkpoint, self._batches = context.node.checkpoint == "always", context.batches
        self._parameters = self._trained()
        self._lost = context.residuals  # by round: what coding kept back of its change

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer an `ArraysTask`."""
        if not isinstance(task, ArraysTask):
            raise ProtocolError(f"a node of federated averaging cannot answer a '{task.kind}'.")
        # Names and shapes are the whole protocol: what is averaged, all parameters or adapters, is the strategy's
        # choice.
        expected = {name: parameter.shape for name, parameter in self._parameters.items()}
        if {name: value.shape for name, value in task.arrays.items()} != expected:
            raise ProtocolError("a task does not fit this node's model: give all nodes the same base model and PEFT.")
        start = time.monotonic()
        change, losses = self._train(task)
        loss, counted = finite_mean(losses)
        return ArraysReply(
            node=self._name,
            round=task.round,
            arrays=self._coded(task.round, change),
            loss=loss,
            skipped=self._config.train.local_steps - counted,
            # Of what arrived, not of the trained weights: the server refuses a change that began elsewhere.
            fingerprint=fingerprint(task.arrays),
            num_examples=len(self._examples),
            seconds=time.monotonic() - start,
            peak_memory=private_peak(),
        )

    def _trained(self) -> Mapping[str, nn.Parameter]:
        return tuned_parameters(self._model)

    def _coded(self, round: int, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Code a round's change together with what the round before it lost.

        A round that is asked once more begins where it did, so its reply is the same. A reply that did not count is
        lost as it would be without coding; what was kept back of it is not.
        """
        # Error feedback: what coding kept back of one change goes up with the next, so that over rounds nothing is
        # lost.
        before = max((one for one in self._lost if one < round), default=0)
        parts, lost = encode_with_feedback(change, self._lost.get(before, {}), self._upload)
        for old in [one for one in self._lost if one != before]:
            del self._lost[old]
        if lost:
            self._lost[round] = lost
        return parts

    @property
    def _upload(self) -> Codec:
        return UPLOADS[self._config.train.upload]

    def _train(self, task: ArraysTask) -> tuple[dict[str, Tensor], list[float]]:
        """AdamW with fresh moments, on float32 copies: all that is trained is one block, with nothing below it."""
        train = self._config.train
        update = train_block(
            self._model,
            Block(0, "all", "embedding", tuple(self._parameters)),
            response_loss,
            list(self._batches(task.round, train.local_steps)),
            train.local_steps,
            task.lr,
            weight_decay=train.weight_decay,
            beta1=train.beta1,
            start=task.arrays,
            checkpoint=self._checkpoint,
        )
        return update.delta, update.losses


class AdapterClient(FedAvgClient):
    """Trains LoRA adapters, which are put into the node's model, by AdamW."""

    def _trained(self) -> Mapping[str, nn.Parameter]:
        lora = self._config.lora
        return add_adapters(self._model, lora.rank, lora.alpha, lora.targets, self._config.train.seed)


class FedZOClient(FedAvgClient):
    """Trains all parameters by zeroth-order steps."""

    _lr = 0.0  # of the last task

    def __init__(self, context: NodeContext) -> None:
        super().__init__(context)
        check_steps(self._model)

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer an `ArraysTask`, with the step size that was taken."""
        reply = super().__call__(task)
        return ZerothReply(**vars(reply), lr=self._lr)

    @property
    def _upload(self) -> Codec:
        return Codec()

    def _train(self, task: ArraysTask) -> tuple[dict[str, Tensor], list[float]]:
        """MeZO's steps (arXiv 2305.17333), each along a Gaussian direction that no other step or node has."""
        eps = self._config.fedzo.eps or default_distance(self._parameters.values())
        steps, key = self._config.train.local_steps, (self._config.train.seed, task.round, self._name)
        # A fresh direction for each step, from round and name: nobody else ever walks along it, so moves cannot be told
        # as scalars and all parameters travel. That is the difference to FedKSeed.
        pool = make_pool("gaussian", key=int(stream("fedzo", *key).random_raw()), size=steps)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(task.arrays[name])
        self._lr = task.lr or self._found(pool, eps)
        taken = local_steps(
            self._model,
            pool,
            response_loss,
            self._batches(task.round, steps),
            range(steps),
            eps=eps,
            lr=self._lr,
        )
        # In float32, also where the weights are not: 16 bits would lose most of it.
        moved = -self._lr * torch.from_numpy(taken.g).nan_to_num(0.0)
        still = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self._parameters.items()}
        return {name: pool.rebuild(name, zero, moved) for name, zero in still.items()}, taken.loss.tolist()

    def _found(self, pool: Pool, eps: float) -> float:
        """Find the step size on a batch of its own, along the first of the round's directions."""
        probed, steps = range(min(DIRECTIONS, pool.size)), self._config.train.local_steps
        batch = next(self._batches(0, 1))
        return calibrate(self._model, pool, response_loss, batch, probed, eps=eps, steps=steps).lr
