"""Frozen weights that are kept outside the model: coded in memory, or in a file.

A frozen matrix is needed only while its layer computes, forward or backward. It is decoded for that moment: with the
others of its layer before the forward pass, and alone when backward asks for it. So a node keeps its frozen blocks in
the bytes in which they came, and one decoded layer at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune_strategies.layer_weights import layer_weights, placeholder

Load = Callable[[str], Tensor]


@contextlib.contextmanager
def offloaded(model: nn.Module, names: Collection[str], load: Load) -> Iterator[None]:
    """Take frozen parameters from `load` while their layer runs, instead of from the model.

    Only what the model's parameters hold on entry stays in memory (see `empty_parameters`), and is there again on exit.
    """
    contents = [(parameter, parameter.data) for parameter in map(model.get_parameter, names)]
    present: dict[int, str] = {}

    def fetch(name: str) -> Tensor:
        parameter = model.get_parameter(name)
        return load(name).to(parameter.device, parameter.dtype)

    @contextlib.contextmanager
    def decoded(stored: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        values = {name: fetch(name) for name in stored}
        own = {value.untyped_storage().data_ptr(): name for name, value in values.items()}
        present.update(own)
        try:
            yield values
        finally:
            for pointer in own:
                del present[pointer]

    # Autograd keeps a matrix's name instead of the matrix, which backward decodes again, one at a time.
    def pack(saved: Tensor) -> Tensor | tuple[str, Any]:
        name = present.get(saved.untyped_storage().data_ptr())
        return saved if name is None else (name, (saved.shape, saved.stride(), saved.storage_offset()))

    def unpack(packed: Tensor | tuple[str, Any]) -> Tensor:
        return packed if isinstance(packed, Tensor) else fetch(packed[0]).as_strided(*packed[1])

    with layer_weights(model, names, decoded), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        try:
            empty_parameters(model, names)
            yield
        finally:
            for parameter, data in contents:
                parameter.data = data


def empty_parameters(model: nn.Module, names: Collection[str]) -> None:
    """Free the memory of parameters; they keep their shape, and NaN shows every use of one that nobody loaded."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = placeholder(parameter, parameter.device)


def empty_model(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build a model whose parameters never take memory: see `empty_parameters`; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(placeholder(parameter, "cpu"), requires_grad=False))
    model.tie_weights()
    return model.requires_grad_(True)
