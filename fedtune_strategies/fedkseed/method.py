"""FedKSeed and FedKSeed-Pro as methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune_strategies.fedkseed.config import FedKSeedProRunConfig, FedKSeedRunConfig
from fedtune_strategies.method import Method, NodeContext, Panel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedtune_strategies.cost import Cost, Fleet, Shape
    from fedtune_strategies.fedkseed.client import FedKSeedClient
    from fedtune_strategies.fedkseed.strategy import FedKSeed
    from fedtune_strategies.language.model import LanguageModel


def _strategy(config: FedKSeedRunConfig, model: nn.Module, base: Mapping[str, Tensor]) -> FedKSeed:
    from fedtune_strategies.fedkseed.pro import FedKSeedPro
    from fedtune_strategies.fedkseed.strategy import FedKSeed
    from fedtune_strategies.seed_space import tuned_parameters

    tuned = {name: base[name] for name in tuned_parameters(model, config.train.parameters or None)}
    return FedKSeedPro(config, tuned) if isinstance(config, FedKSeedProRunConfig) else FedKSeed(config, tuned)


def _client(context: NodeContext) -> FedKSeedClient:
    from fedtune_strategies.fedkseed.client import FedKSeedClient

    return FedKSeedClient(context)


def _messages() -> Sequence[type]:
    from fedtune_strategies.fedkseed.messages import SeedReply, SeedTask

    return SeedTask, SeedReply


def _leaves(config: FedKSeedRunConfig) -> Sequence[str]:
    return (
        f"every round: {config.train.local_steps} numbers, the slopes of the loss on your data along known directions",
    )


def _cost(config: FedKSeedRunConfig, shape: Shape, fleet: Fleet) -> Cost:
    from fedtune_strategies.fedkseed.cost import cost

    return cost(config, shape, fleet)


def _seconds(config: FedKSeedRunConfig, language: LanguageModel, examples: int, clock: Callable[[], float]) -> float:
    from fedtune_strategies.fedkseed.cost import seconds

    return seconds(config, language, clock)


def _panel(config: FedKSeedProRunConfig, state: Mapping[str, Tensor]) -> Panel | None:
    from fedtune_strategies.fedkseed.panel import panel

    return panel(config, state)


FEDKSEED = Method(
    name="fedkseed",
    summary="scalars along seeded directions; kilobytes a round, the memory of inference",
    config=FedKSeedRunConfig,
    strategy=_strategy,
    client=_client,
    leaves=_leaves,
    messages=_messages,
    cost=_cost,
    seconds=_seconds,
)
FEDKSEED_PRO = Method(
    name="fedkseed-pro",
    summary="FedKSeed whose nodes draw seeds by what they have brought",
    config=FedKSeedProRunConfig,
    strategy=_strategy,
    client=_client,
    leaves=_leaves,
    messages=_messages,
    cost=_cost,
    seconds=_seconds,
    panel=_panel,
)
