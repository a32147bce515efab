"""The keys of FedKSeed and FedKSeed-Pro, differential privacy among them."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune_strategies.config.options import option


@dataclass(frozen=True)
class FedKSeedConfig:
    """FedKSeed and FedKSeed-Pro (arXiv 2312.06353)."""

    seeds: int = option(4096, "K, the number of seeded directions.", low=2, high=2**20)
    pool: str = option("walsh", "Kind of directions.", choices=("walsh", "gaussian"))
    pool_every: int = option(
        0, "Rounds after which a fresh pool of directions takes over from the last; 0 for one pool.", low=0
    )
    tune: str = option("", "Regular expression: only parameters with a match in their name are tuned; empty for all.")
    local_steps: int = option(200, "tau, zeroth-order steps of a node in a round.", low=1, high=100_000)
    lr: float = option(
        1e-4, "eta, step size along one direction; 'auto': the nodes find it in the first round.", above=0.0, auto=True
    )
    estimator: str = option(
        "two-sided",
        "How a slope is found: by two losses, by one and a shared one, exactly by forward-mode derivatives (float32 "
        "models), or its sign alone.",
        choices=("two-sided", "one-sided", "forward", "sign"),
    )
    directions: int = option(1, "Steps in a row that share one batch and are taken at once.", low=1)
    micro_batch: int = option(0, "Examples computed at once, for less memory; 0 for the whole batch.", low=0)
    schedule: str = option(
        "constant", "Step size over the rounds, after the warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup: int = option(0, "Rounds over which the step size grows to 'fedkseed.lr'.", low=0)
    eps: float = option(
        1e-3,
        "epsilon, distance of the two loss evaluations from the weights; 'auto': the nodes find it in the first round.",
        above=0.0,
        auto=True,
    )
    clip: float = option(
        10.0, "Scalars are clipped to so many running medians of their magnitude, on both sides; 0 for never.", low=0.0
    )
    outlier: float = option(
        10.0,
        "A reply whose scalars are in the median so many times above or below the running one is refused; 0 for never.",
        low=0.0,
    )
    theta_bits: int = option(
        8, "Bits to which a round's move of an entry of theta is rounded; the rest moves later.", low=3, high=24
    )
    scalar_bits: int = option(32, "Bits of a scalar on the wire: 32, 16 or 8.", low=8, high=32)
    pro_mean: str = option(
        "counted",
        "FedKSeed-Pro's mean amplitude of a seed: 'counted' divides by the draws of the seed, "
        "'faithful' starts every history with the published code's artificial zero.",
        choices=("counted", "faithful"),
    )
    pro_temperature: float = option(
        1.0, "FedKSeed-Pro: temperature of the softmax over seeds; 'faithful' needs 1.", above=0.0
    )
    pro_importance: bool = option(
        False, "FedKSeed-Pro: weigh the step along a seed by 1 / (K p), so that its odds p bias nothing."
    )


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of each example under FedKSeed (DPZero, arXiv 2310.09639)."""

    clip: float = option(0.0, "Largest slope of the loss of one example that counts; 0 for no privacy.", low=0.0)
    noise_multiplier: float = option(1.0, "Standard deviation of a scalar's noise, in units of the clip.", above=0.0)
    delta: float = option(1e-5, "delta, for which epsilon is reported.", above=0.0, high=0.5)
