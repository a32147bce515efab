"""FedCyBGD (arXiv 2406.11187, algorithm 1): nodes train one block of the model in turn.

The server holds every block in float32 under a version number. A round is one turn, or several from one snapshot: the
schedule names blocks and nodes; a node receives its block exactly and, of the frozen rest, the coded form of what it
does not hold yet; it sends back the block's change, and the block's version grows by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues
from flwr.serverapp import Grid
from torch import Tensor

from fedtune_strategies.blocks.codec_config import parse_codec
from fedtune_strategies.blocks.codecs import decode_each, encoded_size
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.train import apply_delta, weighted_mean
from fedtune_strategies.blocks.uploads import fits
from fedtune_strategies.errors import DivergenceError, ProtocolError
from fedtune_strategies.fedcybgd.block_store import BlockStore
from fedtune_strategies.fedcybgd.config import FedCyBGDRunConfig
from fedtune_strategies.fedcybgd.messages import BlockReply, BlockTask
from fedtune_strategies.fedcybgd.node_states import NodeStates
from fedtune_strategies.fedcybgd.schedule import blocks_of_round, nodes_for, rounds_in_cycle
from fedtune_strategies.fedcybgd.screening import (
    FACTOR,
    REMEMBERED,
    largest,
    out_of_line,
)
from fedtune_strategies.fedcybgd.staleness import rebased
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import Deferred, decoded
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategy import (
    State,
    TuningStrategy,
    arrays_of,
    check_origin,
    log,
    mean_loss,
    share_of_step,
    shares,
)

# A task is cut into several above this: Flower holds a message several times over in memory.
PART_BYTES = 64 * 2**20


class Lease(NamedTuple):
    """What a node was given to train in a round."""

    # the block, and the version on which the node was to start
    block: int
    version: int
    fingerprint: str  # fingerprint of all weights on which it was to start


class FedCyBGD(TuningStrategy):
    """Cycle through the blocks of the model; `measure` gives the `layer_influence` by which layers are dropped."""

    def __init__(
        self,
        config: FedCyBGDRunConfig,
        base: Mapping[str, Tensor],
        blocks: Sequence[Block],
        measure: Callable[[], Sequence[float]] = tuple,
    ) -> None:
        self.config = config
        self.settings = config.fedcybgd
        self.takes_late = config.strategy.late > 0
        self.trained = [block.index for block in blocks if not block.frozen]
        codec, dtype = parse_codec(self.settings.rest), next(iter(base.values())).dtype
        self.store = BlockStore(base, blocks, codec, dtype, measure)
        self.node_states = NodeStates(len(blocks))
        self.width = self.settings.nodes_per_round if self.settings.structure == "parallel" else 1
        # Of the present round: which node trains which block, and the blocks that have come.
        self.plan: dict[str, int] = {}
        self._round = 0
        self._accepted: list[int] = []
        # What each node was given, by round and name: a reply must start on just these weights, also one that comes
        # late.
        self.leases: dict[tuple[int, str], Lease] = {}
        # Blocks whose turn brought nothing: the next round has them too.
        self.owed: list[int] = []
        self.committed: tuple[int, list[int]] = (0, [])
        self.sizes: list[float] = []  # maximum norms of the last changes
        self._changed: list[int] = []

    def summary(self) -> None:
        """Log the blocks and their schedule."""
        own = self.settings
        log.info(
            "FedCyBGD: %d blocks, %d trained in %s order, %s with %d nodes a round, AdamW at %g, frozen rest as %s, "
            "changes as %s",
            len(self.store.blocks), len(self.trained), own.order, own.structure, own.nodes_per_round,
            self.config.train.lr, own.rest, self.config.train.upload,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return the versions of the blocks: all zero, the base model."""
        return arrays_of(versions=self.store.versions)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Give the round's nodes their blocks, with what they lack; and the next round's, as far as it is there."""
        assert isinstance(grid, Fleet)
        nodes, lr = list(grid.nodes), self.config.train.lr * share_of_step(config)
        # Asked again within a round (a node was lost), nodes keep their blocks, and what has come is not trained twice.
        if server_round != self._round:
            self._round, self.plan, self._accepted = server_round, {}, []
        self.plan = self._plan(server_round, nodes, self.plan, self._accepted)
        self.leases = {key: lease for key, lease in self.leases.items() if key[0] >= server_round - 1}
        prints = {block: self.store.turn_fingerprint(block) for block in self.plan.values()}
        for name, block in self.plan.items():
            self.leases[server_round, name] = Lease(block, int(self.store.versions[block]), prints[block])
            for make in self._turn(server_round, name, block, lr):
                yield Deferred(grid.nodes[name].id, BlockTask.kind, make, server_round)
        # Idle nodes get what they will lack next round while others compute. What is being trained now is left out: it
        # is about to change.
        if self.settings.prefetch and server_round < self.config.num_server_rounds:
            for name, block in self._plan(server_round + 1, nodes).items():
                if name not in self.plan:
                    for make in self._ahead(server_round, name, block):
                        yield Deferred(grid.nodes[name].id, BlockTask.kind, make, server_round)

    def settled(self, answered: Collection[str]) -> bool:
        """Say whether all turns are there: who is still busy fetches ahead."""
        return bool(self.plan) and self.plan.keys() <= set(answered)

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check round, block, version, shapes, starting weights and size of a reply."""
        if isinstance(reply, protocol.Ack):
            self.node_states.acknowledged(reply.node)
            return False
        if isinstance(reply, protocol.StateMissing):
            log.info("%s holds the base model alone (its worker was restarted): sending it again", reply.node)
            self.node_states.forget(reply.node)
            return False
        if not isinstance(reply, BlockReply):
            raise ProtocolError(f"a node answered a block task with a '{reply.kind}'.")
        self._check(reply, round, self.leases.get((round, reply.node)) if reply.node in self.plan else None)
        self._accepted.append(reply.block)
        return True

    def accept_late(self, round: int, reply: protocol.Message) -> bool:
        """Take a turn of this round or the one before whose lease ran out, if ``strategy.late`` lets it count."""
        if not isinstance(reply, BlockReply) or not self.config.strategy.late or reply.round not in (round, round - 1):
            return super().accept_late(round, reply)
        self._check(reply, reply.round, self.leases.get((reply.round, reply.node)))
        if reply.round == round:
            self._accepted.append(reply.block)
        return True

    def _check(self, reply: BlockReply, round: int, lease: Lease | None) -> None:
        check_origin(reply, round, lease.fingerprint if lease else reply.fingerprint)
        if lease is None or (reply.block, reply.base_version) != (lease.block, lease.version):
            raise ProtocolError(
                f"{reply.node} trained version {reply.base_version} of block {reply.block}, not the one in turn: "
                "the reply is left out."
            )
        # A few coded bytes may claim any shape: nothing is decoded before it fits.
        if not fits(reply.delta, self.store.weights(reply.block), self.config.train.upload):
            raise ProtocolError(f"{reply.node} sent other tensors than block {reply.block} has: the reply is left out.")
        size = largest(reply.delta)
        if reply.steps < 1 or not math.isfinite(size):
            raise DivergenceError(f"{reply.node} sent an update that is not finite: the reply is left out.")
        if out_of_line(size, self.sizes):
            raise ProtocolError(
                f"{reply.node} moved block {reply.block} by up to {size:.3g}, more than {FACTOR:g} times "
                "what is usual in this run: the reply is left out."
            )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Commit the changes of the round's blocks, each the mean of those that came: version + 1.

        A late change whose block nobody else has committed since is one of these; the others are added to the block as
        it is now, with the weight of ``strategy.late``.
        """
        # By name, not by arrival: a mean of floats depends on the order, and a replay must end in the same bits.
        answers = sorted((decoded(reply.content, BlockReply) for reply in replies), key=lambda own: own.node)
        if not answers:
            return None, None
        snapshot = self.store.versions
        last, blocks = self.committed
        # A late change is stale only where its block was committed without it; otherwise it counts in full.
        stale = {answer.node for answer in answers if answer.round == last and answer.block in blocks}
        self._changed = sorted({answer.block for answer in answers})
        done = {answer.block for answer in answers if answer.node not in stale}
        self.owed = [block for block in dict.fromkeys(self._due(server_round)) if block not in done]
        for block in self._changed:
            # One block may have several changes: nodes that share a turn, and late ones of the round before.
            group = [answer for answer in answers if answer.block == block]
            fresh = [answer for answer in group if answer.node not in stale]
            late = [answer for answer in group if answer.node in stale]
            self.sizes = [*self.sizes, *(largest(answer.delta) for answer in group)][-REMEMBERED:]
            self.store.commit(block, dict(self._next(block, fresh, late)))
            for answer in group:
                own = self.node_states.of(answer.node)
                if answer.round == server_round:
                    own = self.node_states.trained(answer.node, server_round, snapshot, self.store.absent_blocks(block))
                own.committed = answer.round
                # A mean of several, or a change on top of another, is nothing that the node could make itself.
                if len(group) == len(fresh) == 1:
                    # The node makes the new version from its own change.
                    own.exact = (block, int(self.store.versions[block]))
                    own.versions[block] = self.store.versions[block]
        self.committed = (server_round, self._changed)
        return arrays_of(versions=self.store.versions), self._metrics(answers)

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Copy the newest version of every block into the model."""
        with torch.no_grad():
            for block in range(len(self.store.blocks)):
                for name, value in self.store.weights(block).items():
                    parameters[name].copy_(value)
        return fingerprint(parameters)

    def state(self) -> State:
        """Return versions, what nodes hold, what is owed and was committed; of the blocks those that changed."""
        tensors = {
            "versions": self.store.versions,
            "owed": torch.tensor(self.owed, dtype=torch.int64),
            "committed": torch.tensor([self.committed[0], *self.committed[1]], dtype=torch.int64),
            "sizes": torch.tensor(self.sizes, dtype=torch.float32),
        }
        return State(tensors | self.node_states.state(), self.store.state(self._changed))

    def stored(self, load: Callable[[str], dict[str, Tensor] | None]) -> None:
        """Hold the blocks that changed as mapped files."""
        self.store.take_stored(self._changed, load)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up what `state` returned, with the newest file of every block."""
        self.store.restore(tensors["versions"], load)
        self.node_states.restore(tensors)
        self.owed, self.sizes = tensors["owed"].tolist(), tensors["sizes"].tolist()
        round, *blocks = tensors["committed"].tolist()
        self.committed = (round, blocks)
        return arrays_of(versions=self.store.versions)

    def _plan(
        self, round: int, nodes: Sequence[str], before: Mapping[str, int] | None = None, done: Sequence[int] = ()
    ) -> dict[str, int]:
        """Say which block each node of a round trains.

        Where the round has begun, nodes keep their blocks; those of lost nodes go to idle ones.
        """
        # A node in the middle of its block is never given another: its work would be lost.
        kept = {name: block for name, block in (before or {}).items() if name in nodes}
        due = self._due(round)
        for block in [*kept.values(), *done]:
            if block in due:
                due.remove(block)
        order = nodes_for(round, nodes, rounds_in_cycle(len(self.trained), self.width))
        return kept | dict(zip((name for name in order if name not in kept), due, strict=False))

    def _due(self, round: int) -> list[int]:
        """Return the blocks of a round, once for each node that trains them; then what lost nodes left undone."""
        own = self.settings
        blocks = blocks_of_round(round, self.width, self.trained, own.order, self.config.train.seed)
        if own.structure == "averaged":
            return blocks * own.nodes_per_round
        return [*blocks, *(block for block in self.owed if block not in blocks)]

    def _turn(self, round: int, node: str, block: int, lr: float) -> Iterator[Callable[[], BlockTask]]:
        """Yield what makes the messages that let a node train a block."""
        # Version 0 is the base model, which every node has; and who trained the block last can make it itself.
        version = int(self.store.versions[block])
        exact = None if version == 0 or self.node_states.of(node).exact == (block, version) else block
        parts = self._parts(node, block, {block})
        last = parts.pop()
        yield from self._offer(round, node, parts)
        yield self._message(round, node, last, exact, block, lr, self.store.absent_layers(block))

    def _ahead(self, round: int, node: str, block: int) -> Iterator[Callable[[], BlockTask]]:
        """Yield what makes the messages with what a node lacks for the next round, but for what is trained now."""
        busy = set(self.plan.values())
        version = int(self.store.versions[block])
        exact = None if block in busy or version == 0 or self.node_states.of(node).exact == (block, version) else block
        parts = [part for part in self._parts(node, block, busy | {block}) if part]
        yield from self._offer(round, node, parts, exact)

    def _offer(
        self, round: int, node: str, parts: Sequence[Sequence[int]], exact: int | None = None
    ) -> Iterator[Callable[[], BlockTask]]:
        held = self.node_states.of(node)
        held.offered.clear()
        for index, part in enumerate([*parts, *([] if exact is None else [[]])]):
            one = exact if index == len(parts) else None
            pair = None if one is None else (one, int(self.store.versions[one]))
            held.offered.append(([(block, int(self.store.versions[block])) for block in part], pair))
            yield self._message(round, node, part, one)

    def _message(
        self, round: int, node: str, part: Sequence[int], exact: int | None, block: int = -1, lr: float = 0.0,
        absent: Sequence[int] = (),
    ) -> Callable[[], BlockTask]:  # fmt: skip
        """Return what makes a message: frozen blocks, maybe one exactly, and which one to train, if any."""
        versions, committed = self.store.versions, self.node_states.of(node).committed

        def make() -> BlockTask:
            weights = {} if exact is None else dict(self.store.weights(exact))
            left_out = torch.tensor(absent, dtype=torch.int64)
            return BlockTask(round, block, versions, weights, self._coded(part), lr, left_out, committed)

        return make

    def _parts(self, node: str, trained: int, without: set[int]) -> list[list[int]]:
        """Group the frozen blocks that a node lacks into messages of bounded size; at least one, maybe empty."""
        # The versions of what the node holds, [blocks], against the newest: only what differs travels, in its coded
        # form.
        held, versions = self.node_states.of(node).versions, self.store.versions
        left_out = without | self.store.absent_blocks(trained)
        parts: list[list[int]] = [[]]
        size = 0
        for block in range(len(versions)):
            if block in left_out or held[block] == versions[block]:
                continue
            coded = encoded_size(self.store.coded(block))
            if parts[-1] and size + coded > PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(block)
            size += coded
        return parts

    def _coded(self, blocks: Iterable[int]) -> dict[str, Tensor]:
        return {key: part for block in blocks for key, part in self.store.coded(block).items()}

    def _next(
        self, block: int, fresh: Sequence[BlockReply], late: Sequence[BlockReply]
    ) -> Iterator[tuple[str, Tensor]]:
        """Move a block by gamma times the mean change of its newest version; then add those of the one before."""
        nodes, weights = self.config.strategy, self.store.weights(block)
        # Tensor by tensor: several copies of a block in float32 may be as large as the model.
        for name, weight in weights.items():
            moved: Mapping[str, Tensor] = {name: weight}
            if fresh:
                changes = [_change(answer, name) for answer in fresh]
                mean = changes[0] if len(changes) == 1 else weighted_mean(changes, shares(fresh, nodes.weighting))
                moved = apply_delta(moved, mean, nodes.server_lr)
            yield name, rebased(moved, [_change(answer, name) for answer in late], nodes.server_lr, nodes.late)[name]

    def _metrics(self, answers: Sequence[BlockReply]) -> MetricRecord:
        metrics: dict[str, MetricRecordValues] = {
            **mean_loss(answers, shares(answers, "examples")),
            "train/skipped": sum(answer.skipped for answer in answers),
            "blocks": self._changed,
            "steps": sum(answer.steps for answer in answers),
        }
        return MetricRecord(metrics)


def _change(answer: BlockReply, name: str) -> dict[str, Tensor]:
    return dict(decode_each({key: part for key, part in answer.delta.items() if key.partition(":")[0] == name}))
