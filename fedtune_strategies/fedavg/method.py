"""FedAvg, FedIT and FedZO as methods: three ways to train locally, one way to average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedtune_strategies.fedavg.config import FedAvgRunConfig, FedITRunConfig, FedZORunConfig
from fedtune_strategies.method import Method, NodeContext, deferred

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedtune_strategies.protocol.messages import Message
    from fedtune_strategies.strategy import TuningStrategy


def _strategy(config: Any, model: nn.Module, base: Mapping[str, Tensor]) -> TuningStrategy:
    from fedtune_strategies.fedavg.fedit import FedIT
    from fedtune_strategies.fedavg.fedzo import FedZO
    from fedtune_strategies.fedavg.strategy import ArraysStrategy
    from fedtune_strategies.seed_space import tuned_parameters

    if isinstance(config, FedITRunConfig):
        return FedIT(config, model, base)
    average = FedZO if isinstance(config, FedZORunConfig) else ArraysStrategy
    return average(config, {name: base[name] for name in tuned_parameters(model)})


def _client(context: NodeContext) -> Callable[[Message], Message]:
    from fedtune_strategies.fedavg.client import AdapterClient, FedAvgClient, FedZOClient

    match context.config:
        case FedITRunConfig():
            return AdapterClient(context)
        case FedZORunConfig():
            return FedZOClient(context)
    return FedAvgClient(context)


def _messages() -> Sequence[type]:
    from fedtune_strategies.fedavg.messages import ArraysReply, ArraysTask, ZerothReply

    return ArraysTask, ArraysReply, ZerothReply


def _method(name: str, summary: str, config: type, leaves: str) -> Method:
    return Method(
        name=name,
        summary=summary,
        config=config,
        strategy=_strategy,
        client=_client,
        leaves=lambda config: (leaves,),
        messages=_messages,
        cost=deferred("fedtune_strategies.fedavg.cost:cost"),
        seconds=deferred("fedtune_strategies.fedavg.cost:seconds"),
    )


FEDAVG = _method(
    "fedavg",
    "all parameters, averaged after local AdamW",
    FedAvgRunConfig,
    "every round: all parameters of the model, as training on your data changed them",
)
FEDIT = _method(
    "fedit",
    "LoRA adapters, averaged after local AdamW",
    FedITRunConfig,
    "every round: the LoRA adapters of the model, as training on your data changed them",
)
FEDZO = _method(
    "fedzo",
    "all parameters, averaged after local zeroth-order steps",
    FedZORunConfig,
    "every round: all parameters of the model, as zeroth-order steps on your data changed them",
)
