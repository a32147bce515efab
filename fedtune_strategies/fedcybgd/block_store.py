"""The server's copy of every block: exact, under a version number; the base model in its type, others in float32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

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
        self._base = base
        # Of the blocks that were committed: in memory until the run's record has them, then mapped from its files.
        self._newest: dict[int, Mapping[str, Tensor]] = {}
        self.versions = torch.zeros(len(blocks), dtype=torch.int64)
        self._codec = codec
        self._dtype = dtype
        self._measure = measure
        self._influence: Sequence[float] | None = None
        self._prints: dict[int, str] = {}

    def weights(self, block: int) -> Mapping[str, Tensor]:
        """Return a block's newest version; never write to it."""
        return self._newest.get(block) or OneBlock(self._base, self.blocks[block].parameters)

    def commit(self, block: int, weights: dict[str, Tensor]) -> None:
        """Take up a block's next version."""
        self._newest[block] = weights
        self.versions = self.versions.clone()
        self.versions[block] += 1
        self._prints.pop(block, None)

    def coded(self, block: int) -> dict[str, Tensor]:
        """Return the parts of a frozen block; see `codecs.encode`."""
        return encode(self.weights(block), self._codec)

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
            self._exact_print(index) if index == trained else self._frozen_print(index) for index in present
        )

    def state(self, changed: Collection[int]) -> dict[str, dict[str, Tensor]]:
        """Return the files to store: the blocks that changed, and the calibration, by label."""
        files = {_label(index): dict(self.weights(index)) for index in changed}
        if self._codec.drop:
            files[CALIBRATION] = {"influence": torch.tensor(self._measured(), dtype=torch.float64)}
        return files

    def restore(self, versions: Tensor, load: Callable[[str], dict[str, Tensor] | None]) -> None:
        """Take up versions and the newest files."""
        self.versions = versions
        self._prints = {}
        self.take_stored(range(len(self.blocks)), load)
        stored = load(CALIBRATION)
        if stored is not None:
            self._influence = stored["influence"].tolist()

    def take_stored(self, blocks: Iterable[int], load: Callable[[str], dict[str, Tensor] | None]) -> None:
        """Hold blocks as their newest files have them, instead of in memory."""
        for block in blocks:
            if found := load(_label(block)):
                self._newest[block] = found

    def _measured(self) -> Sequence[float]:
        if self._influence is None:
            self._influence = self._measure()
        return self._influence

    def _exact_print(self, block: int) -> str:
        return fingerprint((name, value.to(torch.float32)) for name, value in self.weights(block).items())

    def _frozen_print(self, block: int) -> str:
        if block not in self._prints:
            self._prints[block] = fingerprint(frozen_form(self.weights(block), self._codec, self._dtype))
        return self._prints[block]


class OneBlock(Mapping[str, Tensor]):
    """Some of the base model's tensors, each taken when it is asked for: a coded one takes memory only then."""

    def __init__(self, base: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._base, self._names = base, names

    def __getitem__(self, name: str) -> Tensor:
        return self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _label(block: int) -> str:
    return f"block-{block}"
