"""The keys of FedKSeed and FedKSeed-Pro, differential privacy among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedtune_strategies.config import Config, LocalTrainConfig, RobustConfig, option
from fedtune_strategies.errors import ConfigError

# Aggregations that compare replies seed by seed: all nodes draw the same seeds in a round.
COMPARED = ("fedmedian", "trimmed-mean", "krum")


ESTIMATORS = ("two-sided", "one-sided", "forward", "sign", "gradient")


@dataclass(frozen=True)
class SeedTrainConfig(LocalTrainConfig):
    """Zeroth-order steps."""

    local_steps: int = option(200, "tau, zeroth-order steps of a node in a round.", low=1, high=100_000)
    lr: float = option(
        "auto",
        "eta, step size along one direction; 'auto': the nodes find it in the first round.",
        above=0.0,
        auto=True,
    )
    weight_decay: float = option(
        0.0, "Part by which theta shrinks in a round, towards the base model.", low=0.0, high=1.0
    )
    parameters: str = option(
        "", "Regular expression: only parameters with a match in their name are tuned; empty for all."
    )


@dataclass(frozen=True)
class SeedStrategyConfig(RobustConfig):
    """How the nodes' moves become one."""

    aggregation: str = option(
        "fedavg",
        "The Flower strategy that aggregates the nodes' points in seed space. With the last three all nodes draw the "
        "same seeds, so that they can be compared.",
        choices=("fedavg", "fedavgm", "fedadam", "fedyogi", *COMPARED),
    )
    server_lr: float = option(1.0, "theta moves by this much of the aggregated move.", above=0.0)
    momentum: float = option(0.9, "Momentum of fedavgm, beta_1 of fedadam and fedyogi.", low=0.0, high=0.9999)
    second_momentum: float = option(0.99, "beta_2 of fedadam and fedyogi.", low=0.0, high=0.99999)
    adaptivity: float = option(1e-2, "tau of fedadam and fedyogi, in units of the step size.", above=0.0)
    late: float = option(
        0.0,
        "A reply that comes one round late counts so much of a prompt one; 0 leaves it out.",
        low=0.0,
        high=1.0,
    )


@dataclass(frozen=True)
class FedKSeedConfig:
    """FedKSeed (arXiv 2312.06353)."""

    seeds: int = option(4096, "K, the number of seeded directions.", low=2, high=2**20)
    pool: str = option("walsh", "Kind of directions.", choices=("walsh", "gaussian"))
    pool_every: int = option(
        0, "Rounds after which a fresh pool of directions takes over from the last; 0 for one pool.", low=0
    )
    estimator: str = option(
        "two-sided",
        "How slopes are found: one at a time by two losses, by one and a shared one, exactly by forward-mode "
        "derivatives (float32 models), or its sign alone; or all K at once by one backward pass ('gradient').",
        choices=ESTIMATORS,
    )
    directions: int = option(1, "Steps in a row that share one batch and are taken at once.", low=1)
    eps: float = option(
        "auto",
        "epsilon, distance of the two loss evaluations from the weights; 'auto': by their type, 1e-3 in float32, 3e-3 "
        "in float16, 1e-2 in bfloat16.",
        above=0.0,
        auto=True,
    )
    clip: float = option(
        10.0, "Scalars are clipped to so many running medians of their magnitude, on both sides; 0 for never.", low=0.0
    )
    outlier: float = option(
        10.0,
        "A reply whose scalars are in the median so many times above or below the round's is left out; 0 for never.",
        low=0.0,
    )
    theta_bits: int = option(
        8, "Bits to which a round's move of an entry of theta is rounded; the rest moves later.", low=3, high=24
    )
    scalar_bits: int = option(32, "Bits of a scalar on the wire: 32, 16 or 8.", low=8, high=32)


@dataclass(frozen=True)
class FedKSeedProConfig(FedKSeedConfig):
    """FedKSeed-Pro (arXiv 2312.06353, section 4.3)."""

    pro_mean: str = option(
        "counted",
        "Mean amplitude of a seed: 'counted' divides by the draws of the seed, 'faithful' starts every history with "
        "the published code's artificial zero.",
        choices=("counted", "faithful"),
    )


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of each example (DPZero, arXiv 2310.09639; DP-SGD, arXiv 1607.00133)."""

    clip: float = option(
        0.0,
        "Largest slope of the loss of one example that counts, by gradient the largest norm of all K; 0 for no "
        "privacy.",
        low=0.0,
    )
    noise_multiplier: float = option(1.0, "Standard deviation of a slope's noise, in units of the clip.", above=0.0)
    delta: float = option(1e-5, "delta, for which epsilon is reported.", above=0.0, high=0.5)


@dataclass(frozen=True)
class GradientTrainConfig(LocalTrainConfig):
    """First-order steps in seed space."""

    local_steps: int = option(20, "tau, steps of a node in a round, one backward pass each.", low=1, high=100_000)
    lr: float = option(
        "auto",
        "eta, root mean square by which a step changes the weights, as a share of theirs; 'auto': by the model's size.",
        above=0.0,
        high=1.0,
        auto=True,
    )
    beta1: float = option(0.5, "Momentum of the steps, from zero in each round.", low=0.0, high=0.999)
    parameters: str = option(
        "", "Regular expression: only parameters with a match in their name are tuned; empty for all."
    )


@dataclass(frozen=True)
class GradientStrategyConfig(RobustConfig):
    """How the nodes' moves become one."""

    server_lr: float = option(1.0, "theta moves by this much of the aggregated move.", above=0.0)


@dataclass(frozen=True)
class GradientConfig:
    """The seed-space gradient: all K slopes of a fresh pool in each round."""

    seeds: int = option(16384, "K, the number of seeded directions.", low=2, high=2**20)
    pool: str = option("walsh", "Kind of directions.", choices=("walsh", "gaussian"))
    estimator: str = option("gradient", "How slopes are found: all K at once by one backward pass.", choices=ESTIMATORS)
    up_bits: int = option(1, "Bits of a coefficient that a node sends.", low=1, high=8)
    down_bits: int = option(4, "Bits of a coefficient that nodes receive.", low=1, high=8)


@dataclass(frozen=True)
class GradientRunConfig(Config):
    """A run of FedKSeed with the seed-space gradient."""

    train: GradientTrainConfig = field(default_factory=GradientTrainConfig)
    strategy: GradientStrategyConfig = field(default_factory=GradientStrategyConfig)
    fedkseed: GradientConfig = field(default_factory=GradientConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def check(self) -> None:
        """See `Config.check`."""
        super().check()
        check_pattern(self.train.parameters)


def check_pattern(pattern: str) -> None:
    """Raise `ConfigError` unless ``train.parameters`` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"run config: 'train.parameters' is no regular expression: {error}.") from None


@dataclass(frozen=True)
class FedKSeedRunConfig(Config):
    """A run of FedKSeed."""

    variants: ClassVar[tuple[type[Config], ...]] = (GradientRunConfig,)

    train: SeedTrainConfig = field(default_factory=SeedTrainConfig)
    strategy: SeedStrategyConfig = field(default_factory=SeedStrategyConfig)
    fedkseed: FedKSeedConfig = field(default_factory=FedKSeedConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    @classmethod
    def choose(cls, given: Mapping[str, Any]) -> type[Config]:
        """The gradient has its own keys, and other defaults."""
        return GradientRunConfig if given.get("fedkseed.estimator") == "gradient" else cls

    def check(self) -> None:
        """See `Config.check`."""
        super().check()
        own, train = self.fedkseed, self.train
        if self.privacy.clip and (own.estimator != "two-sided" or own.directions > 1):
            raise ConfigError(
                "run config: 'privacy.clip' works with 'fedkseed.estimator' = \"gradient\", and with \"two-sided\" "
                "where 'fedkseed.directions' = 1: set one of these, or 'privacy.clip' to 0."
            )
        if self.privacy.clip and not train.lr:
            raise ConfigError(
                "run config: 'train.lr' must be a number where 'privacy.clip' is set: finding it tells something about "
                "the data."
            )
        if self.strategy.late and self.strategy.aggregation in COMPARED:
            raise ConfigError(
                f"run config: 'strategy.late' does not work with '{self.strategy.aggregation}', which compares replies "
                "of one round: set it to 0, or choose another 'strategy.aggregation'."
            )
        check_pattern(train.parameters)
        if own.scalar_bits not in (8, 16, 32):
            raise ConfigError(f"run config: 'fedkseed.scalar-bits' is {own.scalar_bits}, but must be 8, 16 or 32.")


@dataclass(frozen=True)
class FedKSeedProRunConfig(FedKSeedRunConfig):
    """A run of FedKSeed-Pro."""

    variants: ClassVar[tuple[type[Config], ...]] = ()
    fedkseed: FedKSeedProConfig = field(default_factory=FedKSeedProConfig)

    @classmethod
    def choose(cls, given: Mapping[str, Any]) -> type[Config]:
        """All K slopes at once leave no seeds to choose."""
        return cls

    def check(self) -> None:
        """See `Config.check`."""
        super().check()
        if self.fedkseed.estimator == "gradient":
            raise ConfigError(
                "run config: 'fedkseed.estimator' = \"gradient\" finds all slopes at once, so there are no seeds to "
                "draw: use 'method.name' = \"fedkseed\"."
            )
