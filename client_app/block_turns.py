"""A node's side of FedCyBGD: which version of every block it holds, and the training of one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune_strategies.blocks.codecs import decode, parse_codec
from fedtune_strategies.blocks.exchange import frozen_form, turn_fingerprint
from fedtune_strategies.blocks.find import Block, find_blocks
from fedtune_strategies.blocks.schedule import local_steps_rule
from fedtune_strategies.blocks.train import BlockUpdate, apply_delta, train_block
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.memory import peak_memory
from fedtune_strategies.method import NodeContext
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint


@dataclass(frozen=True)
class _Exact:
    """The one block that the node holds exactly, and the change that it sent for it, if any."""

    block: int
    version: int
    weights: dict[str, Tensor]
    delta: dict[str, Tensor] | None = None


class BlockTurns:
    """The blocks as a node holds them: the frozen form of each in the model, and the last trained one exactly.

    Parameters
    ----------
    context : NodeContext
        The node.
    """

    def __init__(self, context: NodeContext) -> None:
        self._config, self._model, self._base = context.config, context.model, context.base
        self._name, self._examples = context.name, context.examples
        self._codec = parse_codec(self._config.fedcybgd.rest)
        self._blocks: tuple[Block, ...] = ()
        self._versions = torch.empty(0, dtype=torch.int64)
        self._exact: _Exact | None = None

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer a `BlockTask`."""
        if not isinstance(task, protocol.BlockTask):
            raise ProtocolError(f"a node of FedCyBGD cannot answer a '{task.kind}'.")
        start = time.monotonic()
        if not self.take(task):
            return protocol.Lacking(self._name, task.round)
        if task.block < 0:
            return protocol.Kept(self._name, task.round)
        update, starting_print = self.train(task)
        return protocol.BlockReply(
            node=self._name,
            round=task.round,
            block=task.block,
            base_version=int(task.versions[task.block]),
            delta=update.delta,
            loss=sum(update.losses) / len(update.losses) if update.losses else float("nan"),
            steps=update.steps,
            skipped=update.skipped,
            fingerprint=starting_print,
            num_examples=len(self._examples),
            seconds=time.monotonic() - start,
            peak_memory=peak_memory(),
        )

    def take(self, task: protocol.BlockTask) -> bool:
        """Take up what a task brings.

        Parameters
        ----------
        task : BlockTask
            The task.

        Returns
        -------
        bool
            Whether the node now holds what the task counts on. If not, it holds the base model alone.

        Raises
        ------
        ProtocolError
            The task does not fit the model.
        """
        self._check(task)
        if not self._blocks or len(self._versions) != len(task.versions):
            self._reset()
        self._settle(task)
        arrived = decode(task.rest)
        if self._exact and self._blocks[self._exact.block].parameters[0] in arrived:
            self._exact = None
        for block in self._blocks:
            if block.parameters[0] in arrived:
                self._freeze(block, {name: arrived[name].to(self._dtype) for name in block.parameters})
                self._versions[block.index] = task.versions[block.index]
        if task.exact:
            block = self._blocks[task.block]
            self._exact = _Exact(block.index, int(task.versions[block.index]), dict(task.exact))
            self._freeze(block, frozen_form(task.exact, self._codec, self._dtype))
            self._versions[block.index] = task.versions[block.index]
        if task.block >= 0 and not self._versions.equal(task.versions):
            self._reset()
            return False
        return True

    def train(self, task: protocol.BlockTask) -> tuple[BlockUpdate, str]:
        """Train the task's block; `take` said that all is there.

        Parameters
        ----------
        task : BlockTask
            The task.

        Returns
        -------
        tuple of BlockUpdate and str
            The change of the block, and the fingerprint of the weights on which training started.
        """
        settings, size, examples = self._config.fedcybgd, self._config.train.batch_size, self._examples
        key = (self._config.train.seed, task.round, self._name)
        block = self._blocks[task.block]
        start = self._start(block)
        starting_print = self._fingerprint(block, start)
        trained = sum(not block.frozen for block in self._blocks)
        steps = task.steps or local_steps_rule(len(examples), size, trained)
        update = train_block(
            self._model,
            block,
            response_loss,
            list(batches(examples, size, steps, key)),
            steps,
            task.lr,
            weight_decay=settings.weight_decay,
            start=start,
        )
        self._exact = _Exact(block.index, int(self._versions[block.index]), start, update.delta)
        return update, starting_print

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    def _check(self, task: protocol.BlockTask) -> None:
        blocks = self._blocks or self._find()
        names = {name for block in blocks for name in block.parameters}
        known = {part.partition(":")[0] for part in task.rest} | set(task.exact)
        if len(task.versions) != len(blocks) or not -1 <= task.block < len(blocks) or not known <= names:
            raise ProtocolError("a block task does not fit this node's model: give all nodes the same base model.")

    def _find(self) -> tuple[Block, ...]:
        settings = self._config.fedcybgd
        return find_blocks(self._model, settings.layers_per_block, train_embeddings=settings.train_embeddings)

    def _reset(self) -> None:
        """Hold the base model alone, every block in its frozen form."""
        self._blocks = self._find()
        self._versions = torch.zeros(len(self._blocks), dtype=torch.int64)
        self._exact = None
        for block in self._blocks:
            base = {name: self._base[name] for name in block.parameters}
            self._freeze(block, frozen_form(base, self._codec, self._dtype))

    def _settle(self, task: protocol.BlockTask) -> None:
        """Apply the change that this node sent last if the server committed it; drop it if not."""
        held = self._exact
        if held is None or held.delta is None:
            return
        if task.versions[held.block] == held.version + 1:
            weights = apply_delta(held.weights, held.delta, self._config.fedcybgd.gamma)
            self._exact = _Exact(held.block, held.version + 1, weights)
            self._freeze(self._blocks[held.block], frozen_form(weights, self._codec, self._dtype))
            self._versions[held.block] = held.version + 1
        else:
            self._exact = _Exact(held.block, held.version, held.weights)

    def _start(self, block: Block) -> dict[str, Tensor]:
        version = int(self._versions[block.index])
        if self._exact and (self._exact.block, self._exact.version) == (block.index, version):
            return self._exact.weights
        if version == 0:
            return {name: self._base[name].to(torch.float32) for name in block.parameters}
        raise ProtocolError(f"the exact weights of block {block.index}, version {version}, did not come with its turn.")

    def _fingerprint(self, trained: Block, start: Mapping[str, Tensor]) -> str:
        prints = []
        for block in self._blocks:
            frozen = {name: self._model.get_parameter(name).detach() for name in block.parameters}
            prints.append(fingerprint(start if block is trained else frozen))
        return turn_fingerprint(prints)

    @torch.no_grad()
    def _freeze(self, block: Block, weights: Mapping[str, Tensor]) -> None:
        for name in block.parameters:
            self._model.get_parameter(name).copy_(weights[name])
