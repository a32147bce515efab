"""The run configuration: one source for its keys, types, defaults, limits, help and validation.

A run reads the sections that all methods share and those of its method, nothing else. Each field of their dataclasses
is one key of Flower's run config, named ``group.field-name``. `fedtune_strategies.run_config` reads it by method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedtune_strategies.config.options import Scalar, option
from fedtune_strategies.config.sections import (
    AdamWTrainConfig,
    EvalConfig,
    LocalTrainConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    RobustConfig,
    RoundConfig,
    RunConfig,
    SamplingConfig,
    StrategyConfig,
    StreamConfig,
    TrainConfig,
)
from fedtune_strategies.errors import ConfigError

__all__ = [
    "AdamWTrainConfig",
    "Config",
    "LocalTrainConfig",
    "LoraConfig",
    "RobustConfig",
    "SamplingConfig",
    "Scalar",
    "StrategyConfig",
    "TrainConfig",
    "option",
]


@dataclass(frozen=True)
class Config:
    """A checked run configuration; see `run_config.parse`.

    A method's own is a subclass: it adds the method's sections, and may replace ``train`` and ``strategy`` by
    subclasses that have more keys or other defaults. Where a key of the method decides which others it reads, the
    method has a subclass for each: `variants` lists them, `choose` picks one.
    """

    variants: ClassVar[tuple[type[Config], ...]] = ()

    num_server_rounds: int = option(10, "Rounds of the run.", low=1)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    @classmethod
    def choose(cls, given: Mapping[str, Any]) -> type[Config]:
        """Return the class that reads the given keys: this one, or one of `variants`."""
        return cls

    def check(self) -> None:
        """Check the keys that must go together; a subclass adds its own."""
        self.stream.check()
        if self.strategy.min_replies > self.strategy.min_nodes:
            raise ConfigError(
                f"run config: 'strategy.min-replies' is {self.strategy.min_replies}, but must be at most "
                f"'strategy.min-nodes' ({self.strategy.min_nodes}): raise the one or lower the other."
            )
        if not self.eval.data and (self.run.patience or self.run.keep == "best"):
            raise ConfigError(
                "run config: 'run.patience' and 'run.keep' = 'best' go by the held-out loss: set 'eval.data'."
            )
