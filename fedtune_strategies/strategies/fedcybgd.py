"""FedCyBGD (arXiv 2406.11187, algorithm 1): nodes train one block of the model in turn.

The server holds every block in float32 under a version number. A round is one turn, or several from one snapshot: the
schedule names blocks and nodes; a node receives its block exactly and, of the frozen rest, the coded form of what it
does not hold yet; it sends back the block's change, and the block's version grows by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues
from flwr.serverapp import Grid
from torch import Tensor

from fedtune_strategies.blocks.codecs import decode, encoded_size
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.holdings import Holdings
from fedtune_strategies.blocks.master import Master
from fedtune_strategies.blocks.notation import parse_codec
from fedtune_strategies.blocks.rest import Calibration
from fedtune_strategies.blocks.schedule import (
    block_importance,
    blocks_of_round,
    learning_rate,
    nodes_for,
    rounds_in_cycle,
)
from fedtune_strategies.blocks.stale import averaged, rebased
from fedtune_strategies.blocks.train import apply_delta, weighted_mean
from fedtune_strategies.config import Config
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.mail import decoded, task
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategies.base import State, TuningStrategy, arrays_of, check_origin, log

# A task is cut into several above this: Flower holds a message several times over in memory.
PART_BYTES = 64 * 2**20


class Lease(NamedTuple):
    """What a node was given to train in a round.

    Attributes
    ----------
    block, version : int
        The block, and the version on which the node was to start.
    fingerprint : str
        Fingerprint of all weights on which it was to start.
    """

    block: int
    version: int
    fingerprint: str


class FedCyBGD(TuningStrategy):
    """Cycle through the blocks of the model.

    Parameters
    ----------
    config : Config
        The run configuration; `Config.fedcybgd`, `Config.model` and `Config.train` are read.
    base : mapping of str to Tensor
        W_0 by canonical parameter name.
    blocks : sequence of Block
        The blocks of the model, see `fedtune_strategies.blocks.find_blocks`.
    measure : callable
        Makes the `Calibration` by which codecs with wanda or drop choose.
    """

    def __init__(
        self,
        config: Config,
        base: Mapping[str, Tensor],
        blocks: Sequence[Block],
        measure: Callable[[], Calibration] = Calibration,
    ) -> None:
        self.config = config
        self.settings = config.fedcybgd
        self.trained = [block.index for block in blocks if not block.frozen]
        codec, dtype = parse_codec(self.settings.rest), getattr(torch, config.model.dtype)
        self.master = Master(base, blocks, codec, dtype, measure)
        self.holdings = Holdings(len(blocks))
        self.width = self.settings.nodes_per_round if self.settings.structure == "parallel" else 1
        self.plan: dict[str, int] = {}
        self._round = 0
        self._accepted: list[int] = []
        self.leases: dict[tuple[int, str], Lease] = {}
        self.owed: list[int] = []
        self.past: list[tuple[int, int, float]] = []
        self._changed: list[int] = []
        self._before: dict[int, dict[str, Tensor]] = {}

    def summary(self) -> None:
        """Log the blocks and their schedule."""
        own = self.settings
        log.info(
            "FedCyBGD: %d blocks, %d trained in %s order, %s with %d nodes a round, AdamW at %g, frozen rest as %s, "
            "changes as %s",
            len(self.master.blocks), len(self.trained), own.order, own.structure, own.nodes_per_round, own.lr,
            own.rest, own.upload,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return the versions of the blocks: all zero, the base model."""
        return arrays_of(versions=self.master.versions)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Give the round's nodes their blocks, with whatever they lack; and the next round's, as far as it is there."""
        assert isinstance(grid, Fleet)
        nodes = list(grid.nodes)
        if server_round != self._round:
            self._round, self.plan, self._accepted = server_round, {}, []
        self.plan = self._plan(server_round, nodes, self.plan, self._accepted)
        self.leases = {key: lease for key, lease in self.leases.items() if key[0] >= server_round - 1}
        prints = {block: self.master.turn_fingerprint(block) for block in self.plan.values()}
        for name, block in self.plan.items():
            self.leases[server_round, name] = Lease(block, int(self.master.versions[block]), prints[block])
            for message in self._turn(server_round, name, block):
                yield task(grid.nodes[name].id, message, server_round)
        if self.settings.prefetch and server_round < self.config.num_server_rounds:
            for name, block in self._plan(server_round + 1, nodes).items():
                if name not in self.plan:
                    for message in self._ahead(server_round, name, block):
                        yield task(grid.nodes[name].id, message, server_round)

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check round, block, version, shapes and starting weights of a reply."""
        if isinstance(reply, protocol.Kept):
            self.holdings.kept(reply.node)
            return False
        if isinstance(reply, protocol.Lacking):
            log.info("%s holds the base model alone (its worker was restarted): sending it again", reply.node)
            self.holdings.forget(reply.node)
            return False
        if not isinstance(reply, protocol.BlockReply):
            raise ProtocolError(f"a node answered a block task with a '{reply.kind}'.")
        self._check(reply, round, self.leases.get((round, reply.node)) if reply.node in self.plan else None)
        self._accepted.append(reply.block)
        return True

    def accept_late(self, round: int, reply: protocol.Message) -> bool:
        """Take a turn of this round or the one before whose lease ran out, if ``fedcybgd.stale`` lets it count."""
        if (
            not isinstance(reply, protocol.BlockReply)
            or self.settings.stale == "refuse"
            or reply.round not in (round, round - 1)
        ):
            return super().accept_late(round, reply)
        self._check(reply, reply.round, self.leases.get((reply.round, reply.node)))
        if reply.round == round:
            self._accepted.append(reply.block)
        return True

    def _check(self, reply: protocol.BlockReply, round: int, lease: Lease | None) -> None:
        check_origin(reply, round, lease.fingerprint if lease else reply.fingerprint)
        if lease is None or (reply.block, reply.base_version) != (lease.block, lease.version):
            raise ProtocolError(
                f"{reply.node} trained version {reply.base_version} of block {reply.block}, not the one in turn: "
                "the reply is left out."
            )
        delta = decode(reply.delta)
        expected = {name: value.shape for name, value in self.master.weights[reply.block].items()}
        if {name: value.shape for name, value in delta.items()} != expected:
            raise ProtocolError(f"{reply.node} sent other tensors than block {reply.block} has: the reply is left out.")
        if reply.steps < 1 or not all(value.isfinite().all() for value in delta.values()):
            raise ProtocolError(f"{reply.node} sent an update that is not finite: the reply is left out.")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Commit the changes of the round's blocks, each the mean of those that came: version + 1.

        A late change whose block nobody else has committed since is one of these; to the others happens what
        ``fedcybgd.stale`` says.
        """
        answers = sorted((decoded(reply.content, protocol.BlockReply) for reply in replies), key=lambda own: own.node)
        if not answers:
            return None, None
        snapshot = self.master.versions
        committed = {(at, block) for at, block, _ in self.past}
        stale = {answer.node for answer in answers if (answer.round, answer.block) in committed}
        self._changed = sorted({answer.block for answer in answers})
        done = {answer.block for answer in answers if answer.node not in stale}
        self.owed = [block for block in dict.fromkeys(self._due(server_round)) if block not in done]
        before = {block: self.master.weights[block] for block in self._changed}
        for block in self._changed:
            group = [answer for answer in answers if answer.block == block]
            fresh = [answer for answer in group if answer.node not in stale]
            self.master.commit(block, self._next(block, fresh, [answer for answer in group if answer.node in stale]))
            for answer in group:
                own = self.holdings.of(answer.node)
                if answer.round == server_round:
                    own = self.holdings.trained(answer.node, server_round, snapshot, self.master.absent_blocks(block))
                own.committed = answer.round
                if len(group) == len(fresh) == 1:
                    # The node makes the new version from its own change.
                    own.exact = (block, int(self.master.versions[block]))
                    own.versions[block] = self.master.versions[block]
            values = [a.decrease if self.settings.importance == "loss" else a.grad_norm for a in group]
            self.past.append((server_round, block, sum(values) / len(values)))
        self._before = before if self.settings.stale == "average" else {}
        return arrays_of(versions=self.master.versions), self._metrics(answers)

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Copy the newest version of every block into the model."""
        with torch.no_grad():
            for block in self.master.weights:
                for name, value in block.items():
                    parameters[name].copy_(value)
        return fingerprint(parameters)

    def state(self) -> State:
        """Return versions, holdings, history and what is owed; of the blocks those that changed, as they are and were.

        How they were is needed to average a stale change with them, and is there already, unless it is the base model.
        """
        tensors = {
            "versions": self.master.versions,
            "owed": torch.tensor(self.owed, dtype=torch.int64),
            "past": torch.tensor(self.past, dtype=torch.float64).view(-1, 3),
        }
        before = {f"before-{block}": weights for block, weights in self._before.items()}
        return State(tensors | self.holdings.state(), self.master.state(self._changed) | before)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up what `state` returned, with the newest file of every block."""
        self.master.restore(tensors["versions"], load)
        self.holdings.restore(tensors)
        self.owed = tensors["owed"].tolist()
        self.past = [(int(round), int(block), value) for round, block, value in tensors["past"].tolist()]
        if self.settings.stale == "average":
            changed = [block for at, block, _ in self.past if at == self.past[-1][0]]
            self._before = {block: weights for block in changed if (weights := load(f"before-{block}"))}
        return arrays_of(versions=self.master.versions)

    def _plan(
        self, round: int, nodes: Sequence[str], before: Mapping[str, int] | None = None, done: Sequence[int] = ()
    ) -> dict[str, int]:
        """Say which block each node of a round trains.

        Where the round has begun, nodes keep their blocks; those of lost nodes go to idle ones.
        """
        kept = {name: block for name, block in (before or {}).items() if name in nodes}
        due = self._due(round)
        for block in [*kept.values(), *done]:
            if block in due:
                due.remove(block)
        order = nodes_for(round, nodes, rounds_in_cycle(len(self.trained), self.width))
        return kept | dict(zip((name for name in order if name not in kept), due, strict=False))

    def _due(self, round: int) -> list[int]:
        """Return the blocks of a round, once for each node that trains them; then what lost nodes left undone."""
        own, length = self.settings, rounds_in_cycle(len(self.trained), self.width)
        cycle_start = (round - 1) // length * length
        values = [(block, value) for at, block, value in self.past if at <= cycle_start]
        blocks = blocks_of_round(
            round, self.width, self.trained, own.order, self.config.train.seed, block_importance(values, self.trained)
        )
        if own.structure == "averaged":
            return blocks * own.nodes_per_round
        return [*blocks, *(block for block in self.owed if block not in blocks)]

    def _turn(self, round: int, node: str, block: int) -> Iterator[protocol.BlockTask]:
        """Make the messages that let a node train a block."""
        version = int(self.master.versions[block])
        exact = {} if version == 0 or self.holdings.of(node).exact == (block, version) else self.master.weights[block]
        parts = self._parts(node, block, {block})
        last = parts.pop()
        yield from self._offer(round, node, parts)
        own = self.settings
        lr = learning_rate((round - 0.5) / self.config.num_server_rounds, own.lr, own.lr_schedule, own.warmup)
        norms = {} if self.holdings.of(node).norms or parts else dict(self.master.norms)
        yield protocol.BlockTask(
            round, block, self.master.versions, exact, self._coded(last), lr, own.local_steps,
            torch.tensor(self.master.absent_layers(block), dtype=torch.int64), self.holdings.of(node).committed, norms,
        )  # fmt: skip

    def _ahead(self, round: int, node: str, block: int) -> Iterator[protocol.BlockTask]:
        """Make the messages that bring a node what it lacks for the next round, but for what is being trained now."""
        busy = set(self.plan.values())
        version = int(self.master.versions[block])
        exact = None if block in busy or version == 0 or self.holdings.of(node).exact == (block, version) else block
        parts = [part for part in self._parts(node, block, busy | {block}) if part]
        yield from self._offer(round, node, parts, exact)

    def _offer(
        self, round: int, node: str, parts: Sequence[Sequence[int]], exact: int | None = None
    ) -> Iterator[protocol.BlockTask]:
        holding = self.holdings.of(node)
        holding.offered.clear()
        for index, part in enumerate([*parts, *([] if exact is None else [[]])]):
            last = index == len(parts)
            pair = (exact, int(self.master.versions[exact])) if last and exact is not None else None
            holding.offered.append(([(block, int(self.master.versions[block])) for block in part], pair))
            norms = {} if holding.norms or index else dict(self.master.norms)
            weights = {} if pair is None else self.master.weights[pair[0]]
            yield protocol.BlockTask(
                round, -1, self.master.versions, weights, self._coded(part), 0.0, 0,
                torch.empty(0, dtype=torch.int64), holding.committed, norms,
            )  # fmt: skip

    def _parts(self, node: str, trained: int, without: set[int]) -> list[list[int]]:
        """Group the frozen blocks that a node lacks into messages of bounded size; at least one, maybe empty."""
        held, versions = self.holdings.of(node).versions, self.master.versions
        left_out = without | self.master.absent_blocks(trained)
        parts: list[list[int]] = [[]]
        size = 0
        for block in range(len(versions)):
            if block in left_out or held[block] == versions[block]:
                continue
            coded = encoded_size(self.master.coded(block))
            if parts[-1] and size + coded > PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(block)
            size += coded
        return parts

    def _coded(self, blocks: Iterable[int]) -> dict[str, Tensor]:
        return {key: part for block in blocks for key, part in self.master.coded(block).items()}

    def _next(
        self, block: int, fresh: Sequence[protocol.BlockReply], stale: Sequence[protocol.BlockReply]
    ) -> dict[str, Tensor]:
        """Move a block by gamma times the mean change of its newest version; then take in those of the one before."""
        own, weight, weights = self.settings, self.config.strategy.late, self.master.weights[block]
        if fresh:
            weights = apply_delta(weights, self._mean(fresh), own.gamma)
        deltas = [decode(answer.delta) for answer in stale]
        if not deltas:
            return weights
        if own.stale == "rebase":
            return rebased(weights, deltas, own.gamma, weight)
        return averaged(weights, self._before[block], deltas, own.gamma, weight)

    def _mean(self, group: Sequence[protocol.BlockReply]) -> Mapping[str, Tensor]:
        deltas = [decode(answer.delta) for answer in group]
        if len(deltas) == 1:
            return deltas[0]
        weights = [answer.num_examples if self.config.strategy.weighting == "examples" else 1 for answer in group]
        return weighted_mean(deltas, weights)

    def _metrics(self, answers: Sequence[protocol.BlockReply]) -> MetricRecord:
        weight = sum(answer.num_examples for answer in answers)
        metrics: dict[str, MetricRecordValues] = {
            "train/loss": sum(answer.loss * answer.num_examples for answer in answers) / weight,
            "train/skipped": sum(answer.skipped for answer in answers),
            "blocks": self._changed,
            "steps": sum(answer.steps for answer in answers),
        }
        return MetricRecord(metrics)
