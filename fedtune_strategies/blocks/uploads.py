"""A change on its way from a node to the server: what it must look like, and what its coding kept back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedtune_strategies.blocks.codec_config import FEEDBACK, Codec
from fedtune_strategies.blocks.codecs import SIGN_ROW, decode, encode
from fedtune_strategies.errors import ResourceError
from fedtune_strategies.folders import make_folder

Layout = dict[str, tuple[torch.dtype, torch.Size]]


def encode_with_feedback(
    change: Mapping[str, Tensor], residual: Mapping[str, Tensor], codec: Codec
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Code a change and keep what coding lost for the sender's next change of the same tensors (error feedback).

    Returns the parts to send, and the new residual: (change + residual) - what the receiver decodes. It is empty where
    nothing is lost, and with bf16, which rounds each value by at most 0.4 % and keeps no memory of it: so a node that
    was restarted sends the same bits.
    """
    if codec == Codec():
        return dict(change), {}
    if codec.quantisation not in FEEDBACK:
        return encode(change, codec), {}
    wanted = {name: value + residual[name] if name in residual else value for name, value in change.items()}
    parts = encode(wanted, codec)
    return parts, {name: wanted[name] - received for name, received in decode(parts).items()}


def fits(parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor], upload: str) -> bool:
    """Say whether parts are what `encode` makes of a change of these tensors: to be asked before they are decoded."""
    shapes = {f"{name}:shape": list(tensor.shape) for name, tensor in tensors.items()}
    return layout_of(parts) == expected_layout(tensors, upload) and all(
        part.tolist() == shapes[name] for name, part in parts.items() if name in shapes
    )


def layout_of(parts: Mapping[str, Tensor]) -> Layout:
    """Return type and shape of each part of a coded change."""
    return {name: (part.dtype, part.shape) for name, part in parts.items()}


def expected_layout(tensors: Mapping[str, Tensor], upload: str) -> Layout:
    """Return type and shape of each part that `encode` makes of a change of these tensors."""
    layout: Layout = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or upload == "float32":
            layout[name] = (torch.float32, tensor.shape)
        elif upload == "bf16":
            layout[name] = (torch.bfloat16, tensor.shape)
        elif upload == "int8":
            layout[f"{name}:int8"] = (torch.int8, tensor.shape)
            layout[f"{name}:scale"] = (torch.float32, tensor.shape[:-1])
        else:
            by_row = tensor.shape[-1] >= SIGN_ROW
            layout[f"{name}:sign"] = (torch.uint8, torch.Size([-(-tensor.numel() // 8)]))
            layout[f"{name}:scale"] = (torch.float32, tensor.shape[:-1] if by_row else torch.Size())
            layout[f"{name}:shape"] = (torch.int64, torch.Size([tensor.dim()]))
    return layout


class Residuals(MutableMapping[int, Mapping[str, Tensor]]):
    """Named tensors by number, each in a file of a private folder: they take no memory, and outlive the process.

    A kill at any moment leaves each file as it was, or whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __setitem__(self, key: int, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(key)
        partial = path.with_suffix(".partial")
        try:
            make_folder(self._folder)
            safetensors.torch.save_file(dict(tensors), partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", error)
            raise ResourceError(f"cannot keep what coding held back in {self._folder}: {reason}.") from None

    def __getitem__(self, key: int) -> Mapping[str, Tensor]:
        try:
            return safetensors.torch.load(self._path(key).read_bytes())
        except FileNotFoundError:
            raise KeyError(key) from None

    def __delitem__(self, key: int) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(path.stem) for path in self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: int) -> Path:
        return self._folder / f"{key}.safetensors"
