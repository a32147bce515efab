"""FedCyBGD over LoRA adapters: only they are trained and travel; the model that comes out is merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedtune_strategies.blocks.cut import cut_model
from fedtune_strategies.blocks.rest import Calibration
from fedtune_strategies.config import Config
from fedtune_strategies.language.adapters import sharing_weights, weight_changes
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.strategies.fedcybgd import FedCyBGD


class AdapterBlocks(FedCyBGD):
    """Cycle through the adapters of a model, layer by layer.

    Parameters
    ----------
    config : Config
        The run configuration; ``fedavg.rank``, ``alpha`` and ``targets`` are read too.
    model : nn.Module
        The server's model; it stays as it is.
    base : mapping of str to Tensor
        W_0 by canonical parameter name.
    measure : callable
        See `FedCyBGD`.
    """

    def __init__(
        self, config: Config, model: nn.Module, base: Mapping[str, Tensor], measure: Callable[[], Calibration]
    ) -> None:
        self.adapted = sharing_weights(model)
        self.base = base
        blocks = cut_model(self.adapted, config)
        names = [name for block in blocks for name in block.parameters]
        super().__init__(config, {n: self.adapted.get_parameter(n).detach().clone() for n in names}, blocks, measure)

    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Write W_0 + (alpha / rank) B A, summed in float32 and rounded once."""
        with torch.no_grad():
            for weights in self.master.weights:
                for name, value in weights.items():
                    self.adapted.get_parameter(name).copy_(value)
            for name, change in weight_changes(self.adapted):
                parameters[name].copy_(self.base[name].float() + change.float())
        return fingerprint(parameters)
