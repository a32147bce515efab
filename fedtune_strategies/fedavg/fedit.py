"""FedIT (arXiv 2305.05644): nodes train LoRA adapters, which are averaged; the model that comes out is merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedtune_strategies.fedavg.config import FedITRunConfig
from fedtune_strategies.fedavg.strategy import ArraysStrategy
from fedtune_strategies.language.adapters import add_adapters, merge_adapters, sharing_weights
from fedtune_strategies.seed_space import fingerprint


class FedIT(ArraysStrategy):
    """Average adapters: their A and B each for itself, as published."""

    def __init__(self, config: FedITRunConfig, model: nn.Module, base: Mapping[str, Tensor]) -> None:
        self.base = base
        self.adapted = sharing_weights(model)
        lora = config.lora
        self.adapters = add_adapters(self.adapted, lora.rank, lora.alpha, lora.targets, config.train.seed)
        super().__init__(config, {name: parameter.detach().clone() for name, parameter in self.adapters.items()})

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Write W_0 plus what the adapters add."""
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                adapter.copy_(self.current[name])
        merge_adapters(self.adapted, self.base, parameters)
        return fingerprint(parameters)
