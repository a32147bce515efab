"""The server's copy of every block: exact, in float32, under a version number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.blocks.codecs import encode
from fedtune_strategies.blocks.find import Block
from fedtune_strategies.blocks.rest import blocks_inside, dropped_layers
from fedtune_strategies.fedcybgd.frozen_form import frozen_form, turn_fingerprint
from fedtune_strategies.seed_space import fingerprint

CALIBRATION = "calibration"


class BlockStore:
    """Blocks, their versions, and the form in which nodes use them.

    `base`: W_0 by canonical parameter name: version 0 of every block.
    `codec`: coding of a block that is frozen.
    `dtype`: type of the nodes' models.
    `measure`: gives the `layer_influence`; called once, if the codec drops layers and none was stored.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        blocks: Sequence[Block],
        codec: Codec,
        dtype: torch.dtype,
        measure: Callable[[], Sequence[float]] = tuple,
    ) -> None:
        self.blocks = blocks
        self.weights = [{name: base[name].to(torch.float32) for name in block.parameters} for block in blocks]
        self.versions = torch.zeros(len(blocks), dtype=torch.int64)
        self._codec = codec
        self._dtype = dtype
        self._measure = measure
        self._influence: Sequence[float] | None = None
        self._prints: dict[int, str] = {}

    def commit(self, block: int, weights: dict[str, Tensor]) -> None:
        """Take up a block's next version."""
        self.weights[block] = weights
        self.versions = self.versions.clone()
        self.versions[block] += 1
        self._prints.pop(block, None)

    def coded(self, block: int) -> dict[str, Tensor]:
        """Return the parts of a frozen block; see `codecs.encode`."""
        return encode(self.weights[block], self._codec)

    def absent_layers(self, trained: int) -> tuple[int, ...]:
        """Return the layers that are left out while a block is trained."""
        if not self._codec.drop:
            return ()
        return dropped_layers(self._measured(), self._codec.drop, self.blocks[trained])

    def absent_blocks(self, trained: int) -> set[int]:
        """Return the blocks that no node needs while a block is trained."""
        return blocks_inside(self.blocks, self.absent_layers(trained))

    def turn_fingerprint(self, trained: int) -> str:
        """Return the fingerprint of the weights on which a turn starts."""
        absent = self.absent_blocks(trained)
        present = [block.index for block in self.blocks if block.index not in absent]
        return turn_fingerprint(
            fingerprint(self.weights[index]) if index == trained else self._frozen_print(index) for index in present
        )

    def state(self, changed: Collection[int]) -> dict[str, dict[str, Tensor]]:
        """Return the files to store: the blocks that changed, and the calibration, by label."""
        files = {_label(index): self.weights[index] for index in changed}
        if self._codec.drop:
            files[CALIBRATION] = {"influence": torch.tensor(self._measured(), dtype=torch.float64)}
        return files

    def restore(self, versions: Tensor, load: Callable[[str], dict[str, Tensor] | None]) -> None:
        """Take up versions and the newest files."""
        self.versions = versions
        self._prints = {}
        for index in range(len(self.blocks)):
            self.weights[index] = load(_label(index)) or self.weights[index]
        stored = load(CALIBRATION)
        if stored is not None:
            self._influence = stored["influence"].tolist()

    def _measured(self) -> Sequence[float]:
        if self._influence is None:
            self._influence = self._measure()
        return self._influence

    def _frozen_print(self, block: int) -> str:
        if block not in self._prints:
            self._prints[block] = fingerprint(frozen_form(self.weights[block], self._codec, self._dtype))
        return self._prints[block]


def _label(block: int) -> str:
    return f"block-{block}"
