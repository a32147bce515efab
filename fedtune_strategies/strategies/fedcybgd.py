"""FedCyBGD (arXiv 2406.11187, algorithm 1): nodes train one block of the model in turn.

The server holds every block in float32 under a version number. A round is one turn: the schedule names a block and a
node; the node receives that block exactly and, of the frozen rest, the coded form of what it does not hold yet; it
sends back the block's change, and the block's version grows by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues
from flwr.serverapp import Grid
from torch import Tensor

from fedtune_strategies.blocks.codecs import encode, parse_codec
from fedtune_strategies.blocks.exchange import frozen_form, turn_fingerprint
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.schedule import nodes_for, turn_at
from fedtune_strategies.blocks.train import apply_delta
from fedtune_strategies.config import Config
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fleet import Fleet, decoded, task
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategies.base import State, TuningStrategy, arrays_of, check_origin, log

# A task is cut into several above this: Flower holds a message several times over in memory.
PART_BYTES = 64 * 2**20


class FedCyBGD(TuningStrategy):
    """Cycle through the blocks of the model, one node and one block a turn.

    Parameters
    ----------
    config : Config
        The run configuration; `Config.fedcybgd`, `Config.model` and `Config.train` are read.
    base : mapping of str to Tensor
        W_0 by canonical parameter name.
    blocks : sequence of Block
        The blocks of the model, see `fedtune_strategies.blocks.find_blocks`.
    """

    def __init__(self, config: Config, base: Mapping[str, Tensor], blocks: Sequence[Block]) -> None:
        self.config = config
        self.blocks = blocks
        self.codec = parse_codec(config.fedcybgd.rest)
        self.dtype = getattr(torch, config.model.dtype)
        self.trained = [block.index for block in blocks if not block.frozen]
        self.master = [{name: base[name].to(torch.float32) for name in block.parameters} for block in blocks]
        self.versions = torch.zeros(len(blocks), dtype=torch.int64)
        self.held: dict[str, Tensor] = {}
        self.exact: dict[str, tuple[int, int]] = {}
        self.expected = ""
        self.current: int | None = None
        self._changed: int | None = None
        self._frozen_prints = [self._frozen_print(block.index) for block in blocks]

    def summary(self) -> None:
        """Log the blocks and their schedule."""
        settings = self.config.fedcybgd
        log.info(
            "FedCyBGD: %d blocks, %d trained in %s order, AdamW at %g, frozen rest as %s",
            len(self.blocks), len(self.trained), settings.order, settings.lr, settings.rest,
        )  # fmt: skip

    def initial_arrays(self) -> ArrayRecord:
        """Return the versions of the blocks: all zero, the base model."""
        return arrays_of(versions=torch.zeros(len(self.blocks), dtype=torch.int64))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Give the turn's block to the turn's node, with whatever that node lacks."""
        assert isinstance(grid, Fleet)
        settings = self.config.fedcybgd
        block = turn_at(server_round, self.trained, settings.order, self.config.train.seed).block
        name = nodes_for(server_round, list(grid.nodes), len(self.trained))[0]
        self.current = block
        self.expected = self._turn_print(block)
        parts = self._parts(name, block)
        train = protocol.BlockTask(
            server_round,
            block,
            self.versions,
            self._exact_part(name, block),
            parts.pop(),
            settings.lr,
            settings.local_steps,
        )
        keep = [protocol.BlockTask(server_round, -1, self.versions, {}, part, 0.0, 0) for part in parts]
        return [task(grid.nodes[name], message, server_round) for message in [*keep, train]]

    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check round, block, version, shapes and starting weights of a reply."""
        if isinstance(reply, protocol.Kept):
            return False
        if isinstance(reply, protocol.Lacking):
            self._forget(reply.node)
            return False
        if not isinstance(reply, protocol.BlockReply):
            raise ProtocolError(f"a node answered a block task with a '{reply.kind}'.")
        check_origin(reply, round, self.expected)
        if reply.block != self.current or reply.base_version != int(self.versions[reply.block]):
            raise ProtocolError(
                f"{reply.node} trained version {reply.base_version} of block {reply.block}, not the one in turn: "
                "the reply is left out."
            )
        expected = {name: value.shape for name, value in self.master[reply.block].items()}
        if {name: value.shape for name, value in reply.delta.items()} != expected:
            raise ProtocolError(f"{reply.node} sent other tensors than block {reply.block} has: the reply is left out.")
        if reply.steps < 1 or not all(v.is_floating_point() and v.isfinite().all() for v in reply.delta.values()):
            raise ProtocolError(f"{reply.node} sent an update that is not finite: the reply is left out.")
        return True

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Commit the change of the turn's block: version + 1."""
        answer = next((decoded(reply.content, protocol.BlockReply) for reply in replies), None)
        if answer is None:
            return None, None
        block = answer.block
        self.master[block] = apply_delta(self.master[block], answer.delta, self.config.fedcybgd.gamma)
        self.versions = self.versions.clone()
        self.versions[block] += 1
        self._frozen_prints[block] = self._frozen_print(block)
        # The node makes the new version from its own change, so it holds every block as of now.
        self.held[answer.node] = self.versions.clone()
        self.exact[answer.node] = (block, int(self.versions[block]))
        self._changed = block
        metrics: dict[str, MetricRecordValues] = {
            "train/loss": answer.loss,
            "train/skipped": answer.skipped,
            "block": block,
            "steps": answer.steps,
        }
        return arrays_of(versions=self.versions), MetricRecord(metrics)

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Copy the newest version of every block into the model."""
        with torch.no_grad():
            for block in self.master:
                for name, value in block.items():
                    parameters[name].copy_(value)
        return fingerprint(parameters)

    def state(self) -> State:
        """Return the versions, what each node holds, and the block of the turn."""
        held = {f"held/{node}": versions for node, versions in self.held.items()}
        exact = {f"exact/{node}": torch.tensor(pair) for node, pair in self.exact.items()}
        files = {} if self._changed is None else {_label(self._changed): self.master[self._changed]}
        return State({"versions": self.versions} | held | exact, files)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up versions, holdings and the newest file of every block."""
        self.versions = tensors["versions"]
        self.held = {key.removeprefix("held/"): value for key, value in tensors.items() if key.startswith("held/")}
        pairs = {key.removeprefix("exact/"): value for key, value in tensors.items() if key.startswith("exact/")}
        self.exact = {node: (int(pair[0]), int(pair[1])) for node, pair in pairs.items()}
        for index in range(len(self.blocks)):
            stored = load(_label(index))
            if stored is not None:
                self.master[index] = stored
                self._frozen_prints[index] = self._frozen_print(index)
        return arrays_of(versions=self.versions)

    def _exact_part(self, node: str, block: int) -> dict[str, Tensor]:
        version = int(self.versions[block])
        return {} if version == 0 or self.exact.get(node) == (block, version) else self.master[block]

    def _parts(self, node: str, trained: int) -> list[dict[str, Tensor]]:
        """Code the frozen blocks that the node lacks, cut into parts; the last one goes with the task."""
        held = self.held.get(node, torch.zeros_like(self.versions))
        parts: list[dict[str, Tensor]] = [{}]
        for index in range(len(self.blocks)):
            if index == trained or held[index] == self.versions[index]:
                continue
            coded = encode(self.master[index], self.codec)
            if parts[-1] and _bytes(parts[-1]) + _bytes(coded) > PART_BYTES:
                parts.append({})
            parts[-1] |= coded
        return parts

    def _forget(self, node: str) -> None:
        log.info("%s holds the base model alone (its worker was restarted): sending what it lacks again", node)
        self.held.pop(node, None)
        self.exact.pop(node, None)

    def _turn_print(self, block: int) -> str:
        prints = list(self._frozen_prints)
        prints[block] = fingerprint(self.master[block])
        return turn_fingerprint(prints)

    def _frozen_print(self, block: int) -> str:
        return fingerprint(frozen_form(self.master[block], self.codec, self.dtype))


def _label(block: int) -> str:
    return f"block-{block}"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
