"""Base weights that are held coded, or in their file, and made one tensor at a time when somebody asks for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.blocks.codecs import decode, encode, encoded_size
from fedtune_strategies.blocks.offload import empty_model, empty_parameters
from fedtune_strategies.language.model_files import map_tensors, stored_names, weight_files

CODECS = {"exact": Codec(), "int8": Codec("int8"), "nf4": Codec("nf4")}
"""What is kept of the base model's matrices, by the value of ``model.base``."""


class CodedWeights(Mapping[str, Tensor]):
    """Weights by canonical name, decoded at each access, in the given dtype.

    What the codes decode to *is* the base model: every holder of the same files makes the same codes, and gets the same
    bits from them. Vectors are kept as they are. The tensors themselves are not kept; those of codec "exact" are where
    they came from, such as a mapped file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], codec: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts = {name: encode({name: tensor}, CODECS[codec]) for name, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return sum(map(encoded_size, self._parts.values()))

    def __getitem__(self, name: str) -> Tensor:
        return decode(self._parts[name])[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class Only(Mapping[str, Tensor]):
    """Some of the tensors of a mapping, each fetched when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Collection[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_empty(folder: Path, dtype: torch.dtype, base: str) -> tuple[PreTrainedModel, CodedWeights] | None:
    """Build a model without weights and code these straight from its files; None where they have other names there."""
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = empty_model(lambda: AutoModelForCausalLM.from_config(settings, dtype=dtype))
    stored = map_tensors(weight_files(folder))
    keys = stored_names(model, stored)
    if not stored.keys() >= set(keys.values()):
        return None
    return model, CodedWeights({name: stored[key] for name, key in keys.items()}, base, dtype)


@torch.no_grad()
def code_loaded(model: PreTrainedModel, base: str, *, empty: bool) -> CodedWeights:
    """Code a model's weights; it then holds what the codes decode to, or nothing."""
    tensors = {name: weights.clone() if weights.dim() < 2 else weights for name, weights in model.named_parameters()}
    coded = CodedWeights(tensors, base, model.dtype)
    if empty:
        empty_parameters(model, coded)
    else:
        for name, tensor in coded.items():
            model.get_parameter(name).copy_(tensor)
    return coded
