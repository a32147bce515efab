"""What the server knows that each node holds.

It only decides what is sent: a node that lacks something says so, is forgotten here, and gets everything again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class NodeState:
    """What one node holds."""

    versions: Tensor  # int64 [D], version of every block in its frozen form
    # block and version that the node holds exactly beside the base model; (-1, 0) for none
    exact: tuple[int, int] = (-1, 0)
    committed: int = 0  # the last turn of this node that was committed, 0 for none
    # what is under way in parts that the node has not acknowledged, oldest first: block and version of each frozen
    # block, and the exact block or None
    offered: deque[tuple[list[tuple[int, int]], tuple[int, int] | None]] = field(default_factory=deque)


class NodeStates:
    """Every node's `NodeState` by name; a node that is not known holds the base model."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._nodes: dict[str, NodeState] = {}

    def of(self, node: str) -> NodeState:
        """Return a node's state, to be read or changed."""
        return self._nodes.setdefault(node, NodeState(torch.zeros(self._blocks, dtype=torch.int64)))

    def acknowledged(self, node: str) -> None:
        """A node acknowledged the oldest part that it was offered."""
        held = self.of(node)
        if not held.offered:
            return
        frozen, exact = held.offered.popleft()
        held.exact = exact or held.exact
        for block, version in frozen:
            held.versions[block] = version

    def trained(self, node: str, turn: int, versions: Tensor, absent: Iterable[int]) -> NodeState:
        """A turn of a node was committed: it held the versions on which the turn started, but for absent blocks."""
        held = self.of(node)
        kept = {block: held.versions[block] for block in absent}
        held.versions = versions.clone()
        for block, version in kept.items():
            held.versions[block] = version
        held.committed = turn
        return held

    def forget(self, node: str) -> None:
        """A node holds the base model alone; which of its turns was committed stays true."""
        committed = self.of(node).committed
        del self._nodes[node]
        self.of(node).committed = committed

    def state(self) -> dict[str, Tensor]:
        """Return all states as tensors, int64 [D + 3] for each node."""
        return {
            f"held/{node}": torch.cat([own.versions, torch.tensor([*own.exact, own.committed])])
            for node, own in self._nodes.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        self._nodes = {}
        for key, value in tensors.items():
            if key.startswith("held/"):
                block, version, committed = value[self._blocks :].tolist()
                own = NodeState(value[: self._blocks].clone(), (block, version), committed)
                self._nodes[key.removeprefix("held/")] = own
