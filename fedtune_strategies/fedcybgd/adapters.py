"""FedCyBGD over LoRA adapters: only they are trained and travel; the model that comes out is merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedtune_strategies.fedcybgd.config import FedCyBGDRunConfig
from fedtune_strategies.fedcybgd.partition import cut_model
from fedtune_strategies.fedcybgd.strategy import FedCyBGD
from fedtune_strategies.language.adapters import merge_adapters, sharing_weights
from fedtune_strategies.seed_space import fingerprint


class AdapterBlocks(FedCyBGD):
    """Cycle through the adapters of a model, layer by layer; the server's model stays as it is."""

    def __init__(
        self,
        config: FedCyBGDRunConfig,
        model: nn.Module,
        base: Mapping[str, Tensor],
        measure: Callable[[], Sequence[float]],
    ) -> None:
        self.adapted = sharing_weights(model)
        self.base = base
        blocks = cut_model(self.adapted, config)
        names = [name for block in blocks for name in block.parameters]
        super().__init__(config, {n: self.adapted.get_parameter(n).detach().clone() for n in names}, blocks, measure)

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Write W_0 plus what the adapters add."""
        with torch.no_grad():
            for block in range(len(self.store.blocks)):
                for name, value in self.store.weights(block).items():
                    self.adapted.get_parameter(name).copy_(value)
        merge_adapters(self.adapted, self.base, parameters)
        return fingerprint(parameters)
