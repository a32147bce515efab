"""What rounding kept back of a node's updates, block by block, for its next turn on the same block."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import IO

import safetensors.torch
from torch import Tensor


class Residuals:
    """Tensors by block, in files without a name: they take no memory, and go with the process."""

    def __init__(self) -> None:
        self._files: dict[int, IO[bytes]] = {}

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace a block's remainder."""
        self._close(block)
        if tensors:
            self._files[block] = tempfile.TemporaryFile()  # noqa: SIM115  # closed when replaced
            self._files[block].write(safetensors.torch.save(dict(tensors)))

    def get(self, block: int) -> dict[str, Tensor]:
        """Return a block's remainder, empty where there is none."""
        if block not in self._files:
            return {}
        self._files[block].seek(0)
        return safetensors.torch.load(self._files[block].read())

    def clear(self) -> None:
        """Forget all."""
        for block in list(self._files):
            self._close(block)

    def _close(self, block: int) -> None:
        if block in self._files:
            self._files.pop(block).close()
