"""The keys of federated averaging and its variants."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtune_strategies.config import AdamWTrainConfig, Config, LocalTrainConfig, LoraConfig, RobustConfig, option


@dataclass(frozen=True)
class FedZOConfig:
    """FedZO (arXiv 2201.09531)."""

    eps: float = option(
        "auto",
        "Distance of the two loss evaluations from the weights; 'auto': by their type, as 'fedkseed.eps'.",
        above=0.0,
        auto=True,
    )


@dataclass(frozen=True)
class FedZOTrainConfig(LocalTrainConfig):
    """Zeroth-order steps."""

    lr: float = option(
        "auto", "Step size along one direction; 'auto': the nodes find it in the first round.", above=0.0, auto=True
    )


@dataclass(frozen=True)
class FedAvgRunConfig(Config):
    """FedAvg (arXiv 1602.05629) of all parameters."""

    train: AdamWTrainConfig = field(default_factory=AdamWTrainConfig)
    strategy: RobustConfig = field(default_factory=RobustConfig)


@dataclass(frozen=True)
class FedITRunConfig(FedAvgRunConfig):
    """FedIT (arXiv 2305.05644): FedAvg of LoRA adapters."""

    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class FedZORunConfig(Config):
    """FedAvg of all parameters after zeroth-order steps."""

    train: FedZOTrainConfig = field(default_factory=FedZOTrainConfig)
    strategy: RobustConfig = field(default_factory=RobustConfig)
    fedzo: FedZOConfig = field(default_factory=FedZOConfig)
