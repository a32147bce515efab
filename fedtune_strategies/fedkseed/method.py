"""FedKSeed and FedKSeed-Pro as methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune_strategies.fedkseed.config import FedKSeedProRunConfig, FedKSeedRunConfig, GradientRunConfig
from fedtune_strategies.method import Method, NodeContext, deferred

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedtune_strategies.protocol.messages import Message
    from fedtune_strategies.strategy import TuningStrategy


def _strategy(
    config: FedKSeedRunConfig | GradientRunConfig, model: nn.Module, base: Mapping[str, Tensor]
) -> TuningStrategy:
    from fedtune_strategies.fedkseed.gradient_strategy import SeedGradient
    from fedtune_strategies.fedkseed.pro import FedKSeedPro
    from fedtune_strategies.fedkseed.strategy import FedKSeed
    from fedtune_strategies.language.coded import Only
    from fedtune_strategies.seed_space import tuned_parameters

    tuned = Only(base, tuned_parameters(model, config.train.parameters or None))
    if isinstance(config, GradientRunConfig):
        return SeedGradient(config, tuned)
    return FedKSeedPro(config, tuned) if isinstance(config, FedKSeedProRunConfig) else FedKSeed(config, tuned)


def _client(context: NodeContext) -> Callable[[Message], Message]:
    from fedtune_strategies.fedkseed.client import FedKSeedClient
    from fedtune_strategies.fedkseed.gradient_client import SeedGradientClient

    return (SeedGradientClient if isinstance(context.config, GradientRunConfig) else FedKSeedClient)(context)


def _messages() -> Sequence[type]:
    from fedtune_strategies.fedkseed.messages import GradientReply, GradientTask, GradientWeights, SeedReply, SeedTask

    return SeedTask, SeedReply, GradientTask, GradientWeights, GradientReply


def _leaves(config: FedKSeedRunConfig | GradientRunConfig) -> Sequence[str]:
    if isinstance(config, GradientRunConfig):
        bits = config.fedkseed.seeds * config.fedkseed.up_bits
        return (f"every round: {bits:,} bits and one number, which way training on your data moved the model",)
    return (
        f"every round: {config.train.local_steps} numbers, the slopes of the loss on your data along known directions",
    )


FEDKSEED = Method(
    name="fedkseed",
    summary="scalars or sign bits along seeded directions; kilobytes a round, about the memory of inference",
    config=FedKSeedRunConfig,
    strategy=_strategy,
    client=_client,
    leaves=_leaves,
    messages=_messages,
    cost=deferred("fedtune_strategies.fedkseed.cost:cost"),
    seconds=deferred("fedtune_strategies.fedkseed.cost:seconds"),
    by_layers=True,
    panel=deferred("fedtune_strategies.fedkseed.panel:panel"),
)
FEDKSEED_PRO = Method(
    name="fedkseed-pro",
    summary="FedKSeed whose nodes draw seeds by what they have brought",
    config=FedKSeedProRunConfig,
    strategy=_strategy,
    client=_client,
    leaves=_leaves,
    messages=_messages,
    cost=deferred("fedtune_strategies.fedkseed.cost:cost"),
    seconds=deferred("fedtune_strategies.fedkseed.cost:seconds"),
    by_layers=True,
    panel=deferred("fedtune_strategies.fedkseed.panel:panel"),
)
