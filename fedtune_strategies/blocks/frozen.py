"""The frozen blocks on a node: as weights in the model, or coded in memory or on disk."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fedtune_strategies.blocks.chunked_matmul import chunked, large_modules
from fedtune_strategies.blocks.codecs import decode, decode_rows
from fedtune_strategies.blocks.offload import empty_parameters, offloaded
from fedtune_strategies.language.model_files import map_tensors
from fedtune_strategies.layer_weights import require_reads_within_layers


class FrozenBlocks:
    """The frozen form of every block, for one model.

    Unless matrices are held "decoded", the model's are emptied: they are decoded when used. On disk they are mapped
    files without a name, which go with the process.
    """

    def __init__(self, model: nn.Module, names: Collection[str], hold: str) -> None:
        self._model = model
        self._names = set(names)
        self._hold = hold
        self._parts: dict[str, Mapping[str, Tensor]] = {}
        self._outside = set() if hold == "decoded" else {n for n in names if model.get_parameter(n).dim() > 1}
        if self._outside:
            require_reads_within_layers(model, self._outside)
        empty_parameters(model, self._outside)

    @torch.no_grad()
    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Take up parts of `codecs.encode`, replacing what there was of the same parameters."""
        held = {key: part for key, part in parts.items() if key.partition(":")[0] in self._outside}
        for key, part in (_on_disk(held) if self._hold == "disk" and held else held).items():
            name = key.partition(":")[0]
            self._parts[name] = {k: v for k, v in self._parts.get(name, {}).items() if k in held} | {key: part}
        for name, value in decode({key: part for key, part in parts.items() if key not in held}).items():
            self._model.get_parameter(name).copy_(value)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter in its frozen form, in the type of the model."""
        parameter = self._model.get_parameter(name)
        if name not in self._outside:
            return parameter.detach()
        return self._decoded(name).to(parameter.dtype)

    @contextlib.contextmanager
    def in_use(self, trained: Collection[str]) -> Iterator[None]:
        """Let the model compute with what is held, for as long as the context lasts, but for the trained block."""
        large = large_modules(self._model, self._names - set(trained))
        with contextlib.ExitStack() as stack:
            stack.enter_context(chunked(large, self._rows))
            # A large matrix is decoded some rows at a time by its own module, so its layer must not decode it whole.
            if outside := self._outside - set(trained) - set(large.values()):
                stack.enter_context(offloaded(self._model, outside, self._decoded))
            yield

    def _decoded(self, name: str) -> Tensor:
        return decode(self._parts[name])[name]

    def _rows(self, name: str, rows: slice | Tensor) -> Tensor:
        parameter = self._model.get_parameter(name)
        if name not in self._outside:
            return parameter.detach()[rows]
        index = rows if isinstance(rows, slice) else rows.cpu()
        return decode_rows(self._parts[name], name, index).to(parameter.device, parameter.dtype)


def _on_disk(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move tensors into a file that is mapped and has no name any more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parts.safetensors"
        safetensors.torch.save_file({key: part.contiguous() for key, part in parts.items()}, file)
        return map_tensors([file])
