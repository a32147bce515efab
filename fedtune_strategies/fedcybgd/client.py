"""A node's side of FedCyBGD: which version of every block it holds, and the training of one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune_strategies.blocks.codec_config import UPLOADS, parse_codec
from fedtune_strategies.blocks.codecs import decode, encode
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.frozen import FrozenBlocks
from fedtune_strategies.blocks.layers import without_layers
from fedtune_strategies.blocks.rest import blocks_inside
from fedtune_strategies.blocks.train import BlockUpdate, apply_delta, train_block
from fedtune_strategies.blocks.uploads import encode_with_feedback
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedcybgd.config import FedCyBGDRunConfig
from fedtune_strategies.fedcybgd.frozen_form import turn_fingerprint
from fedtune_strategies.fedcybgd.messages import BlockReply, BlockTask
from fedtune_strategies.fedcybgd.partition import cut_model
from fedtune_strategies.fedcybgd.schedule import local_steps_rule
from fedtune_strategies.language.loss import finite_mean, response_loss
from fedtune_strategies.memory import prefer_memory, private_peak
from fedtune_strategies.method import NodeContext
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint


@dataclass(frozen=True)
class _Exact:
    """The one block that the node holds exactly beside the base model."""

    block: int
    version: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Sent:
    """The last update that the node sent, until it knows whether it was committed."""

    turn: int
    start: _Exact
    delta: Mapping[str, Tensor]


class FedCyBGDClient:
    """The blocks as a node holds them: all in their frozen form, one also exactly."""

    def __init__(self, context: NodeContext) -> None:
        self._config: FedCyBGDRunConfig = context.config
        self._model, self._node = context.model, context.node
        self._name, self._examples = context.name, context.examples
        self._batches = context.batches
        settings = self._config.fedcybgd
        self._codec = parse_codec(settings.rest)
        self._upload = UPLOADS[self._config.train.upload]
        self._blocks = cut_model(self._model, self._config)
        names = [name for block in self._blocks for name in block.parameters]
        self._base: Mapping[str, Tensor] = context.base
        if settings.adapters:
            self._base = {name: self._model.get_parameter(name).detach().clone() for name in names}
        if self._node.frozen != "decoded":
            prefer_memory()
        # Every block in the coded form in which it travelled: both sides decode the same bytes, so a node's frozen
        # weights are those that the server has fingerprinted, however they are held.
        self._frozen = FrozenBlocks(self._model, names, self._node.frozen)
        self._versions: Tensor | None = None
        self._exact: _Exact | None = None
        self._sent: _Sent | None = None
        # By block: what coding kept back of its last committed change; under minus its turn, what it kept back of the
        # change that was sent last.
        self._residuals = context.residuals

    def __call__(self, task: protocol.Message) -> protocol.Message:
        """Answer a `BlockTask`."""
        if not isinstance(task, BlockTask):
            raise ProtocolError(f"a node of FedCyBGD cannot answer a '{task.kind}'.")
        start = time.monotonic()
        # A task brings what the node lacks; if something is still missing (the worker was started again) it says so
        # rather than train on other weights, and is sent everything.
        if not self.take(task):
            return protocol.StateMissing(self._name, task.round)
        # A part that was sent ahead, or one of several: there is nothing to train yet.
        if task.block < 0:
            return protocol.Ack(self._name, task.round)
        update, parts, starting_print = self.train(task)
        return BlockReply(
            node=self._name,
            round=task.round,
            block=task.block,
            base_version=int(task.versions[task.block]),
            delta=parts,
            loss=finite_mean(update.losses)[0],
            steps=update.steps,
            skipped=update.skipped,
            fingerprint=starting_print,
            num_examples=len(self._examples),
            seconds=time.monotonic() - start,
            peak_memory=private_peak(),
        )

    def take(self, task: BlockTask) -> bool:
        """Take up what a task brings; says whether all that it counts on is there. If not, only the base model is."""
        self._check(task)
        if self._versions is None:
            self._reset()
        # Order matters: its own last change first, for the server counts on it where nothing newer comes; then what is
        # newer.
        self._settle(task)
        self._take_frozen(task)
        self._take_exact(task)
        if task.block >= 0 and not self._holds(task):
            self._reset()
            return False
        return True

    def train(self, task: BlockTask) -> tuple[BlockUpdate, dict[str, Tensor], str]:
        """Train the block of a task that was taken up: its change, what travels, and the start's fingerprint."""
        settings, train, examples = self._config.fedcybgd, self._config.train, self._examples
        size = train.batch_size
        block = self._blocks[task.block]
        # float32, exactly as the server holds it: small steps would vanish in a coded or 16-bit block.
        start = self._start(block)
        absent = task.dropped.tolist()
        starting_print = self._fingerprint(start, absent)
        trained = sum(not block.frozen for block in self._blocks)
        steps = train.local_steps or local_steps_rule(len(examples), size, trained)
        # Within a turn every pass over the data has the same batches, so that what is below the block can be kept.
        count = min(steps * settings.accumulate, -(-len(examples) // size))
        # Backward stops at the block: below it nothing is recorded, above it gradients pass through weights that take
        # none. Dropped layers are not there at all. Memory is the frozen rest, the block with its gradient and two
        # moments, and the activations from it up.
        with self._frozen.in_use(block.parameters), without_layers(self._model, absent):
            update = train_block(
                self._model,
                block,
                response_loss,
                list(self._batches(task.round, count)),
                steps,
                task.lr,
                weight_decay=train.weight_decay,
                beta1=train.beta1,
                start=start.weights,
                accumulate=settings.accumulate,
                autocast=None if settings.autocast == "none" else getattr(torch, settings.autocast),
                checkpoint=self._node.checkpoint == "always",
                cache_bytes=int(self._node.prefix_cache_mb * 1e6) if steps * settings.accumulate > count else 0,
            )
        parts, lost = encode_with_feedback(update.delta, self._residuals.get(block.index, {}), self._upload)
        # Until the next task says whether the change counted, start and change are both kept: the node can then make
        # the new version itself, and its own block need not come down again.
        self._exact = start
        self._sent = _Sent(task.round, start, decode(parts))
        if lost:
            self._residuals[-task.round] = lost
        return update, parts, starting_print

    def _check(self, task: BlockTask) -> None:
        shapes = {name: self._model.get_parameter(name).shape for block in self._blocks for name in block.parameters}
        arrived = {name: value.shape for name, value in (decode(task.frozen) | task.exact).items()}
        if (
            len(task.versions) != len(self._blocks)
            or not -1 <= task.block < len(self._blocks)
            or not arrived.items() <= shapes.items()
            or any(not 0 <= layer < len(self._blocks) for layer in task.dropped.tolist())
        ):
            raise ProtocolError("a block task does not fit this node's model: give all nodes the same base model.")

    def _reset(self) -> None:
        """Hold the base model alone, every block in its frozen form."""
        self._versions = torch.zeros(len(self._blocks), dtype=torch.int64)
        self._exact = self._sent = None
        for block in self._blocks:
            self._freeze({name: self._base[name] for name in block.parameters})

    def _settle(self, task: BlockTask) -> None:
        """Apply the change that this node sent last if the server committed it; drop it if not."""
        self._settle_lost(task)
        sent, self._sent = self._sent, None
        if sent is None or task.committed != sent.turn:
            return
        # Where others trained the block too, the server sends the mean, which replaces this.
        weights = apply_delta(sent.start.weights, sent.delta, self._config.strategy.server_lr)
        self._hold_exactly(_Exact(sent.start.block, sent.start.version + 1, weights))

    def _settle_lost(self, task: BlockTask) -> None:
        """Do so with what coding kept back, which a worker that was ended has left to this one."""
        if not task.versions.any():  # a run begins, perhaps once more
            self._residuals.clear()
        for turn in [-key for key in self._residuals if key < 0]:
            if turn == task.committed:
                lost = self._residuals[-turn]
                block = next(block.index for block in self._blocks if lost.keys() <= set(block.parameters))
                self._residuals[block] = lost
            del self._residuals[-turn]

    def _take_frozen(self, task: BlockTask) -> None:
        for block in self._blocks:
            own = {key: part for key, part in task.frozen.items() if key.partition(":")[0] in block.parameters}
            if own:
                self._frozen.put(own)
                self._version(block.index, int(task.versions[block.index]))
                if self._exact and self._exact.block == block.index:
                    self._exact = None

    def _take_exact(self, task: BlockTask) -> None:
        for block in self._blocks:
            own = {name: task.exact[name] for name in block.parameters if name in task.exact}
            if own:
                self._hold_exactly(_Exact(block.index, int(task.versions[block.index]), own))

    def _hold_exactly(self, exact: _Exact) -> None:
        self._exact = exact
        self._freeze(exact.weights)
        self._version(exact.block, exact.version)

    def _holds(self, task: BlockTask) -> bool:
        assert self._versions is not None
        needed = torch.ones(len(self._blocks), dtype=torch.bool)
        needed[list(blocks_inside(self._blocks, task.dropped.tolist()))] = False
        version = int(task.versions[task.block])
        exact = self._exact and (self._exact.block, self._exact.version) == (task.block, version)
        return bool(version == 0 or exact) and self._versions[needed].equal(task.versions[needed])

    def _start(self, block: Block) -> _Exact:
        assert self._versions is not None
        if self._versions[block.index] == 0:
            return _Exact(block.index, 0, {name: self._base[name].to(torch.float32) for name in block.parameters})
        assert self._exact is not None  # as `take` saw
        return self._exact

    def _fingerprint(self, start: _Exact, absent: Sequence[int]) -> str:
        # Without the dropped layers, which took no part. The server computes the same from what it sent.
        prints = []
        left_out = blocks_inside(self._blocks, absent)
        for block in self._blocks:
            if block.index not in left_out:
                frozen = {} if block.index == start.block else {n: self._frozen.tensor(n) for n in block.parameters}
                prints.append(fingerprint(frozen or start.weights))
        return turn_fingerprint(prints)

    def _freeze(self, weights: Mapping[str, Tensor]) -> None:
        self._frozen.put(encode(weights, self._codec))

    def _version(self, block: int, version: int) -> None:
        assert self._versions is not None
        self._versions[block] = version
