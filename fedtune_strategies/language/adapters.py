"""LoRA adapters (arXiv 2106.09685) by the PEFT library."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtune_strategies.errors import ConfigError


def add_adapters(model: nn.Module, rank: int, alpha: int, targets: str, seed: int) -> dict[str, nn.Parameter]:
    """Put adapters of a rank into a model, scaled by alpha / rank; what it computes does not change yet.

    The targeted layers are wrapped, which moves their weights to other names. `targets` is as PEFT takes it:
    ``"all-linear"``, a regular expression, or empty for PEFT's choice. `seed` draws the adapters' start.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("adapters need PEFT, here and on every node: pip install peft") from None
    # What text does not train (a vision tower) gets no adapters.
    frozen = [name for name, module in model.named_modules() if not getattr(_weight(module), "requires_grad", True)]
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets or None, exclude_modules=frozen or None, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(lora, model)
        except ValueError as error:
            line = str(error).splitlines()[0][:200]
            raise ConfigError(f"run config: 'lora.targets' is '{targets}': {line}") from None
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def sharing_weights(model: nn.Module) -> nn.Module:
    """Copy the modules of a model but not its weights, so that adapters can be put into the copy.

    Freezing the copy's parameters, as adapters do, leaves those of the model as they are.
    """
    return copy.deepcopy(model, {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()})


def merge_adapters(model: nn.Module, base: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Write W_0 + (alpha / rank) B A into the adapted weights, summed in float32 and rounded once."""
    with torch.no_grad():
        for name, change in weight_changes(model):
            parameters[name].copy_(base[name].float() + change.float())


def weight_changes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a model's adapters add to its weights, (alpha / rank) B A, by the weights' names without adapters."""
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [
        (n, module) for n, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, layer in layers:
        yield f"{name}.weight", layer.get_delta_weight(layer.active_adapters[0])
