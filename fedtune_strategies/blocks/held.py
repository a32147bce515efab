"""Frozen weights that live outside the model: coded in memory, or in a file.

A frozen matrix is needed only while its own module computes, forward or backward. Here it is decoded for that moment:
before the module's forward, and again when backward asks for it, because autograd keeps the matrix's name and not the
matrix. So a node holds its frozen rest in the bytes in which it came, and one decoded matrix at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune_strategies.blocks.codecs import decode

Load = Callable[[str], Tensor]


@contextlib.contextmanager
def held_outside(
    model: nn.Module, names: Collection[str], load: Load, without: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Take parameters from `load` whenever they are used, instead of from the model.

    Parameters
    ----------
    model : nn.Module
        The model. Only what its parameters hold on entry stays in memory (see `empty_parameters`), and is there again
        on exit.
    names : collection of str
        Canonical names of frozen parameters, each used by the modules that own it and nowhere else.
    load : callable
        Gives a parameter by name, of its shape, any float dtype; see `coded_loader`.
    without : collection of nn.Module
        Modules that see to their parameters themselves.
    """
    outside = {model.get_parameter(name): name for name in names}
    contents = [(parameter, parameter.data) for parameter in outside]
    owners = {
        module: {attribute: parameter for attribute, parameter in own.items() if parameter in outside}
        for module in model.modules()
        if module not in without
        and not outside.keys().isdisjoint((own := dict(module.named_parameters(recurse=False))).values())
    }
    present: dict[int, nn.Parameter] = {}

    def fetch(parameter: nn.Parameter) -> Tensor:
        return load(outside[parameter]).to(parameter.device, parameter.dtype)

    # A decoded matrix is a parameter of its own, so whatever autograd keeps of it stays valid when its module is done.
    def before(module: nn.Module, *_: Any) -> None:
        for attribute, parameter in owners[module].items():
            decoded = nn.Parameter(fetch(parameter), requires_grad=False)
            present[decoded.untyped_storage().data_ptr()] = parameter
            setattr(module, attribute, decoded)

    def after(module: nn.Module, *_: Any) -> None:
        for attribute, parameter in owners[module].items():
            present.pop(getattr(module, attribute).untyped_storage().data_ptr(), None)
            setattr(module, attribute, parameter)

    def pack(saved: Tensor) -> Tensor | tuple[nn.Parameter, Any]:
        parameter = present.get(saved.untyped_storage().data_ptr())
        return saved if parameter is None else (parameter, (saved.shape, saved.stride(), saved.storage_offset()))

    def unpack(packed: Tensor | tuple[nn.Parameter, Any]) -> Tensor:
        return packed if isinstance(packed, Tensor) else fetch(packed[0]).as_strided(*packed[1])

    with contextlib.ExitStack() as stack:
        for module in owners:
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        try:
            empty_parameters(model, names)
            yield
        finally:
            for parameter, data in contents:
                parameter.data = data


def empty_parameters(model: nn.Module, names: Collection[str]) -> None:
    """Free the memory of parameters; they keep their shape, and NaN shows every use of one that nobody loaded.

    Parameters
    ----------
    model : nn.Module
        The model, changed in place.
    names : collection of str
        Canonical names of the parameters.
    """
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = _nothing(parameter, parameter.device)


def empty_model(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build a model whose parameters never take memory: all are as `empty_parameters` leaves them.

    Parameters
    ----------
    build : callable
        Makes the model, e.g. ``lambda: AutoModelForCausalLM.from_config(config)``.

    Returns
    -------
    PreTrainedModel
        The model; its buffers are real. Give the parameters that are not held outside their values (``.data = …``).
    """
    with init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_nothing(parameter, "cpu"), requires_grad=False))
    model.tie_weights()
    return model.requires_grad_(True)


def coded_loader(parts: Mapping[str, Tensor]) -> Load:
    """Decode single tensors out of coded parts.

    Parameters
    ----------
    parts : mapping of str to Tensor
        As `codecs.encode` made them: in memory, or a mapping that reads them from a file.

    Returns
    -------
    callable
        Gives a float32 tensor by canonical name.
    """
    kinds: dict[str, list[str]] = {}
    for part in parts:
        kinds.setdefault(part.partition(":")[0], []).append(part)
    return lambda name: decode({part: parts[part] for part in kinds[name]})[name]


def _nothing(parameter: nn.Parameter, device: torch.device | str) -> Tensor:
    """Return a tensor like a parameter that takes the memory of one number."""
    return torch.full((1,), torch.nan, dtype=parameter.dtype, device=device).expand(parameter.shape)
