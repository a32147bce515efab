"""Other weights in place of a model's own, just before a layer runs and only while it does.

One mechanism for all that computes with weights which are not stored in the model: rebuilt at a point of seed space,
decoded from a coded form, read from a file. A decoder layer gets all of its weights at once, because a layer reads not
only through the modules that own them: mamba's mixer reads ``self.conv1d.weight``, GPT-NeoX Japanese adds a bias that
its attention returned. What stands outside the layers (embedding, final norm, head) gets its own where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _forward_unimplemented  # how torch marks a module that cannot be called

from fedtune_strategies.blocks.find import decoder_layers
from fedtune_strategies.errors import ModelError
from fedtune_strategies.seed_space.parameters import canonical_names

Values = Callable[[Mapping[str, Tensor]], AbstractContextManager[Mapping[str, Tensor]]]
"""From stored tensors by canonical name to those to compute with: entered before a layer runs, left after it.

Autograd follows those that require a gradient.
"""

_Slots = dict[tuple[nn.Module, str], str]
"""Canonical names by the module and attribute that hold a parameter."""


@contextmanager
def layer_weights(model: nn.Module, names: Collection[str], values: Values) -> Iterator[None]:
    """Let a model compute with other weights, which exist for one layer at a time.

    The model's weights are read by its decoder layers, or by the modules outside of them that own them (see
    `reads_within_layers`); it may be spread out by `accelerate.dispatch_model`. `values` gives those of the named
    parameters, of the same shapes, dtypes and devices as the stored ones. Enter contexts that skip, cache or checkpoint
    layers inside of this one, so that a skipped layer costs nothing and a repeated one has its weights again.
    """
    in_use: dict[nn.Parameter, Tensor] = {}
    with ExitStack() as stack:
        for module, slots in _units(model, set(names)).items():
            # accelerate keeps a module's own forward here, and calls it between loading and unloading the weights.
            attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"
            function = partial(_run, getattr(module, attribute), slots, values, in_use)
            stack.enter_context(forward_as(module, function, attribute))
        yield


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any], attribute: str = "forward") -> Iterator[None]:
    """Replace the forward of one module, whose own or replaced one comes back at the end."""
    replaced_before = vars(module).get(attribute)
    setattr(module, attribute, function)
    try:
        yield
    finally:
        if replaced_before is None:
            delattr(module, attribute)
        else:
            setattr(module, attribute, replaced_before)


@torch.no_grad()
def reads_within_layers(model: nn.Module, names: Collection[str], loss: Callable[[], Tensor]) -> bool:
    """Whether a model reads its weights only where `layer_weights` exchanges them, those aside that are not in memory.

    Compares two losses of one batch: of the model as it is, and of the model with NaN for stored weights and its true
    weights given just before each layer. No weight is copied.
    """
    parameters = {name: p for name in names if not (p := model.get_parameter(name)).is_meta}
    true = {name: parameter.data for name, parameter in parameters.items()}
    expected = loss()
    try:
        for parameter in parameters.values():
            parameter.data = placeholder(parameter, parameter.device)
        with layer_weights(model, parameters, lambda stored: nullcontext({name: true[name] for name in stored})):
            return torch.allclose(loss(), expected, rtol=1e-4, equal_nan=True)
    except (RuntimeError, IndexError, ValueError, KeyError):  # NaN where numbers were counted on
        return False
    finally:
        for name, parameter in parameters.items():
            parameter.data = true[name]


def require_reads_within_layers(model: nn.Module, names: Collection[str]) -> None:
    """Refuse a model of transformers for which `layer_weights` would be wrong, by two short forward passes."""
    config = getattr(model, "config", None)
    devices = [parameter.device for name in names if not (parameter := model.get_parameter(name)).is_meta]
    if config is None or not devices:
        return
    ids = torch.arange(8, device=devices[0])[None] % config.get_text_config().vocab_size
    training = model.training
    model.eval()
    if not reads_within_layers(model, names, lambda: model(input_ids=ids, use_cache=False).logits):
        raise ModelError(
            f"{type(model).__name__} reads weights outside of the layer that they belong to, so they must stay in "
            "memory as they are: use float32 weights, and frozen = decoded on the node"
        )
    model.train(training)


def placeholder(like: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the same shape and dtype that takes the memory of one number, and shows its use by NaN."""
    return torch.full((1,), torch.nan, dtype=like.dtype, device=device).expand(like.shape)


def _run(
    forward: Callable[..., Any],
    slots: _Slots,
    values: Values,
    in_use: dict[nn.Parameter, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    # Looked up now, because accelerate loads a weight as a new parameter.
    before = {(module, attribute): getattr(module, attribute) for module, attribute in slots}
    # A tied weight is exchanged once, also where a module around this one has done it.
    new = {name: before[slot] for slot, name in slots.items() if before[slot] not in in_use}
    try:
        with values({name: parameter.data for name, parameter in new.items()}) as used:
            # A new parameter each time, so that what autograd keeps of it stays valid after the layer.
            in_use |= {parameter: _as_parameter(used[name]) for name, parameter in new.items()}
            for (module, attribute), parameter in before.items():
                module._parameters[attribute] = in_use[parameter]  # type: ignore[assignment]  # any tensor will do
            return forward(*args, **kwargs)
    finally:
        for (module, attribute), parameter in before.items():
            module._parameters[attribute] = parameter
        for parameter in new.values():
            in_use.pop(parameter, None)


def _as_parameter(value: Tensor) -> Tensor:
    return value if value.requires_grad else nn.Parameter(value, requires_grad=False)


def _units(model: nn.Module, names: set[str]) -> dict[nn.Module, _Slots]:
    """Modules around which weights are exchanged, each with what is exchanged there."""
    canonical, around = canonical_names(model), _around_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))  # a shared module is in several layers
    found: dict[nn.Module, _Slots] = {}
    for path, module in modules.items():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = canonical[f"{path}.{attribute}".lstrip(".")]
            if name in names:
                # What accelerate holds elsewhere is there only while its own module runs.
                unit = module if parameter.is_meta else modules[_unit(path, modules, around)]
                found.setdefault(unit, {})[module, attribute] = name
    return found


def _around_layers(model: nn.Module) -> set[str]:
    """Paths of the modules that contain the decoder layers."""
    try:
        path, _ = decoder_layers(model)
    except ModelError:  # no layers: the children of the model are units
        return {""}
    parts = path.split(".")
    return {".".join(parts[:end]) for end in range(len(parts) + 1)}


def _unit(path: str, modules: Mapping[str, nn.Module], around: set[str]) -> str:
    """Path of the outermost module at or above `path` that runs as one and is not around the decoder layers."""
    parts = path.split(".") if path else []
    chain = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    callable_ones = [one for one in chain if type(modules[one]).forward is not _forward_unimplemented]
    return next((one for one in callable_ones if one not in around), callable_ones[-1])
