"""The keys of federated averaging and its variants."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune_strategies.config.options import option


@dataclass(frozen=True)
class FedAvgConfig:
    """FedAvg (arXiv 1602.05629) of all parameters, FedIT (arXiv 2305.05644) and FedZO (arXiv 2201.09531)."""

    local_steps: int = option(50, "Local steps of a node in a round.", low=1, high=100_000)
    lr: float = option(1e-3, "Learning rate of the local AdamW; FedZO: step size along one direction.", above=0.0)
    beta1: float = option(
        0.9,
        "Momentum of the local AdamW (decay of its first moment), anew in each round.",
        low=0.0,
        high=0.999,
    )
    weight_decay: float = option(0.0, "Weight decay of the local AdamW.", low=0.0)
    eps: float = option(1e-3, "FedZO: distance of the two loss evaluations from the weights.", above=0.0)
    rank: int = option(8, "FedIT: rank of the adapters.", low=1)
    alpha: int = option(16, "FedIT: adapters are scaled by alpha / rank.", low=1)
    targets: str = option(
        "",
        "FedIT: modules that get an adapter, as PEFT takes them: 'all-linear', a regular expression of their names, or "
        "empty for PEFT's choice for the architecture.",
    )
