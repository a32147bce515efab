"""A node's side of federated averaging: train what the task brings, and send it back as it is then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.train import apply_delta, train_block
from fedtune_strategies.draws import stream
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.language.adapters import add_adapters
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.memory import peak_memory
from fedtune_strategies.method import NodeContext
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint, make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import local_steps

Train = Callable[[protocol.ArraysTask], tuple[dict[str, Tensor], list[float]]]


class LocalTraining:
    """The parameters that are averaged, and how they are trained.

    Parameters
    ----------
    context : NodeContext
        The node; ``method.name`` says how: ``"fedavg"`` by AdamW, ``"fedit"`` by AdamW on adapters alone, which are put
        into the node's model, ``"fedzo"`` by zeroth-order steps.
    """

    def __init__(self, context: NodeContext) -> None:
        self._config, self._model = context.config, context.model
        self._name, self._examples = context.name, context.examples
        self._parameters: Mapping[str, nn.Parameter] = (
            add_adapters(context.model, context.config.fedavg, context.config.train.seed)
            if context.config.method.name == "fedit"
            else tuned_parameters(context.model)
        )
        self._train: Train = self._zeroth_order if context.config.method.name == "fedzo" else self._adamw

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer an `ArraysTask`."""
        if not isinstance(task, protocol.ArraysTask):
            raise ProtocolError(f"a node of federated averaging cannot answer a '{task.kind}'.")
        expected = {name: parameter.shape for name, parameter in self._parameters.items()}
        if {name: value.shape for name, value in task.arrays.items()} != expected:
            raise ProtocolError("a task does not fit this node's model: give all nodes the same base model and PEFT.")
        start = time.monotonic()
        arrays, losses = self._train(task)
        finite = [loss for loss in losses if math.isfinite(loss)]
        return protocol.ArraysReply(
            node=self._name,
            round=task.round,
            arrays=arrays,
            loss=float(np.mean(finite)) if finite else math.nan,
            skipped=self._config.fedavg.local_steps - len(finite),
            fingerprint=fingerprint(task.arrays),
            num_examples=len(self._examples),
            seconds=time.monotonic() - start,
            peak_memory=peak_memory(),
        )

    def _adamw(self, task: protocol.ArraysTask) -> tuple[dict[str, Tensor], list[float]]:
        """AdamW with fresh moments, on float32 copies: all that is trained is one block, below which nothing lies."""
        settings, size = self._config.fedavg, self._config.train.batch_size
        update = train_block(
            self._model,
            Block(0, "all", "embedding", tuple(self._parameters)),
            response_loss,
            list(batches(self._examples, size, settings.local_steps, self._key(task))),
            settings.local_steps,
            settings.lr,
            weight_decay=settings.weight_decay,
            beta1=settings.beta1,
            start=task.arrays,
        )
        return apply_delta(task.arrays, update.delta), update.losses

    def _zeroth_order(self, task: protocol.ArraysTask) -> tuple[dict[str, Tensor], list[float]]:
        """MeZO's steps (arXiv 2305.17333), each along a Gaussian direction that no other step or node has."""
        settings, size = self._config.fedavg, self._config.train.batch_size
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(task.arrays[name])
        steps = local_steps(
            self._model,
            make_pool("gaussian", key=int(stream("fedzo", *self._key(task)).random_raw()), size=settings.local_steps),
            response_loss,
            batches(self._examples, size, settings.local_steps, self._key(task)),
            range(settings.local_steps),
            eps=settings.eps,
            lr=settings.lr,
        )
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}, steps.loss.tolist()

    def _key(self, task: protocol.ArraysTask) -> tuple[int, int, str]:
        return (self._config.train.seed, task.round, self._name)
