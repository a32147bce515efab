"""The run configuration: one source for its keys, types, defaults, limits, help and validation.

Each field of the dataclasses in this package is one key of Flower's run config, named ``group.field-name``. `parse`
checks a flat mapping against them; `defaults` and `as_toml` make the ``[tool.flwr.app.config]`` table of
pyproject.toml.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedtune_strategies.config.fedavg import FedAvgConfig
from fedtune_strategies.config.fedcybgd import FedCyBGDConfig, check_fedcybgd
from fedtune_strategies.config.fedkseed import FedKSeedConfig, PrivacyConfig
from fedtune_strategies.config.options import Scalar, accepted, as_toml_value, option, options, section
from fedtune_strategies.config.sections import (
    COMPARED,
    METHODS,
    EvalConfig,
    MethodConfig,
    ModelConfig,
    RoundConfig,
    RunDirConfig,
    StrategyConfig,
    TrainConfig,
)
from fedtune_strategies.errors import ConfigError

__all__ = [
    "METHODS",
    "Config",
    "FedAvgConfig",
    "FedCyBGDConfig",
    "FedKSeedConfig",
    "Key",
    "Scalar",
    "StrategyConfig",
    "as_toml",
    "defaults",
    "keys",
    "option",
    "parse",
    "section",
]


@dataclass(frozen=True)
class Config:
    """A checked run configuration; see `parse`.

    `own` holds the keys of a method of another package, ``<method.name>.<key>``, as they came: it checks them itself,
    with `section`.
    """

    num_server_rounds: int = option(10, "Rounds of the run; for FedCyBGD the number of turns.", low=1)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    fedkseed: FedKSeedConfig = field(default_factory=FedKSeedConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    fedcybgd: FedCyBGDConfig = field(default_factory=FedCyBGDConfig)
    fedavg: FedAvgConfig = field(default_factory=FedAvgConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)
    own: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """One key of the run config.

    Attributes
    ----------
    name : str
        Kebab-case name with its group, such as ``train.seq-length``.
    type : type
        str, int, float or bool.
    default : str, int, float or bool
        Default value.
    help : str
        One sentence.
    accepted : str
        The accepted values in words.
    """

    name: str
    type: type
    default: Scalar
    help: str
    accepted: str


def keys() -> list[Key]:
    """List all keys in their documented order."""
    return [
        Key(name, kind, typing.cast(Scalar, spec.default), spec.metadata["help"], accepted(kind, spec))
        for name, kind, spec in options(Config)
    ]


def defaults() -> dict[str, Scalar]:
    """Return every key with its default: the flat run config of an unconfigured run."""
    return {key.name: key.default for key in keys()}


def parse(flat: Mapping[str, Any]) -> Config:
    """Check a flat run config and build a `Config` from it.

    Parameters
    ----------
    flat : mapping of str to str, int, float or bool
        Keys as in `keys`; absent ones take their defaults. An int is accepted where a float is asked for.

    Returns
    -------
    Config
        The checked configuration.

    Raises
    ------
    ConfigError
        A key is unknown, has the wrong type, or its value is out of range: the line names the key and the
        accepted values.
    """
    method = flat.get("method.name")
    own = {name: value for name, value in flat.items() if method not in METHODS and name.startswith(f"{method}.")}
    config = section(Config, "", {name: value for name, value in flat.items() if name not in own})
    config = replace(config, own=own)
    _check_together(config)
    return config


def as_toml() -> str:
    """Render the ``[tool.flwr.app.config]`` table, without its heading."""
    return "".join(f"{key.name} = {as_toml_value(key.default)}\n" for key in keys())


def _check_together(config: Config) -> None:
    if config.method.name == "fedcybgd":
        check_fedcybgd(config.fedcybgd, config.strategy)
    if config.strategy.min_replies > config.strategy.min_nodes and config.method.name != "fedcybgd":
        raise ConfigError(
            f"run config: 'strategy.min-replies' is {config.strategy.min_replies}, but must be at most "
            f"'strategy.min-nodes' ({config.strategy.min_nodes}): raise the one or lower the other."
        )
    seeds = config.fedkseed
    if config.privacy.clip and (
        not config.method.name.startswith("fedkseed") or seeds.estimator != "two-sided" or seeds.directions > 1
    ):
        raise ConfigError(
            "run config: 'privacy.clip' works with FedKSeed, 'fedkseed.estimator' = \"two-sided\" and "
            "'fedkseed.directions' = 1 alone: set these, or 'privacy.clip' to 0."
        )
    if config.strategy.late and config.strategy.aggregation in COMPARED:
        raise ConfigError(
            f"run config: 'strategy.late' does not work with '{config.strategy.aggregation}', which compares replies "
            "of one round: set it to 0, or choose another 'strategy.aggregation'."
        )
    if config.privacy.clip and not (seeds.lr and seeds.eps):
        raise ConfigError(
            "run config: 'fedkseed.lr' and 'fedkseed.eps' must be numbers where 'privacy.clip' is set: finding them "
            "tells something about the data."
        )
    try:
        re.compile(seeds.tune)
    except re.error as error:
        raise ConfigError(f"run config: 'fedkseed.tune' is no regular expression: {error}.") from None
    if config.fedkseed.scalar_bits not in (8, 16, 32):
        raise ConfigError(
            f"run config: 'fedkseed.scalar-bits' is {config.fedkseed.scalar_bits}, but must be 8, 16 or 32."
        )
    if config.fedkseed.pro_mean == "faithful" and config.fedkseed.pro_temperature != 1.0:
        raise ConfigError(
            f"run config: 'fedkseed.pro-temperature' is {config.fedkseed.pro_temperature}, but must be 1 "
            "where 'fedkseed.pro-mean' is 'faithful'."
        )
