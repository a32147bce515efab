"""The run configuration: one source for its keys, types, defaults, limits, help and validation.

Each field below is one key of Flower's run config, named ``group.field-name``. `parse` checks a flat mapping
against these dataclasses; `defaults` and `as_toml` make the ``[tool.flwr.app.config]`` table of pyproject.toml.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedtune_strategies.errors import ConfigError

Scalar: TypeAlias = str | int | float | bool


def option(
    default: Scalar,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare one key: its default, its help and the values that it accepts.

    Parameters
    ----------
    default : str, int, float or bool
        Default value.
    help : str
        One sentence for the command line and the documentation.
    choices : tuple of str
        The accepted values of a text key; any text where empty.
    low, high : float
        Inclusive limits of a number.
    above : float
        Exclusive lower limit of a number.

    Returns
    -------
    Any
        A dataclass field.
    """
    limits = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class MethodConfig:
    """Which algorithm tunes the model."""

    name: str = option("fedkseed", "Tuning method.", choices=("fedkseed", "fedkseed-pro", "fedcybgd"))


@dataclass(frozen=True)
class ModelConfig:
    """The base model, the same on every node."""

    name: str = option(
        "fedtune-tiny", "Hugging Face causal LM: a folder, a Hub id, or the embedded model 'fedtune-tiny'."
    )
    dtype: str = option(
        "float32", "Type of the weights in memory and in the export.", choices=("float32", "bfloat16", "float16")
    )


@dataclass(frozen=True)
class TrainConfig:
    """What every local step does, whatever the method."""

    seq_length: int = option(256, "Longest sequence in tokens, prompt and response together.", low=8)
    batch_size: int = option(8, "Examples in one local step.", low=1)
    seed: int = option(0, "Seed of the run: directions, draws, batches and node sampling.", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class StrategyConfig:
    """Which nodes take part and how their replies are weighed."""

    fraction_train: float = option(1.0, "Fraction of the known nodes asked in a round.", above=0.0, high=1.0)
    min_nodes: int = option(1, "Fewest nodes that must be present before a round starts.", low=1)
    min_replies: int = option(1, "Fewest accepted replies with which a round counts.", low=1)
    weighting: str = option(
        "examples", "Weight of a reply: its node's number of examples, or equal.", choices=("examples", "uniform")
    )
    aggregation: str = option(
        "fedavg",
        "FedKSeed: the Flower strategy that aggregates the nodes' points in seed space. With the last three all nodes "
        "draw the same seeds, so that they can be compared.",
        choices=("fedavg", "fedavgm", "fedadam", "fedyogi", "fedmedian", "trimmed-mean", "krum"),
    )
    server_lr: float = option(1.0, "FedKSeed: theta moves by this much of the aggregated move.", above=0.0)
    momentum: float = option(0.9, "Momentum of fedavgm, beta_1 of fedadam and fedyogi.", low=0.0, high=0.9999)
    second_momentum: float = option(0.99, "beta_2 of fedadam and fedyogi.", low=0.0, high=0.99999)
    adaptivity: float = option(1e-2, "tau of fedadam and fedyogi, in units of the step size.", above=0.0)
    trim: float = option(0.2, "Part of the replies that trimmed-mean cuts off at either end.", low=0.0, high=0.49)
    faulty_nodes: int = option(1, "Nodes that krum expects to be faulty.", low=0)
    weight_decay: float = option(
        0.0, "FedKSeed: part by which theta shrinks in a round, towards the base model.", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class RoundConfig:
    """How long a round waits."""

    deadline: float = option(600.0, "Seconds after which a round goes on without the replies still missing.", above=0.0)
    node_wait: float = option(120.0, "Seconds to wait for 'strategy.min-nodes' nodes before giving up.", low=0.0)
    attempts: int = option(3, "How often a round with too few replies is tried before the run ends.", low=1)


@dataclass(frozen=True)
class FedKSeedConfig:
    """FedKSeed and FedKSeed-Pro (arXiv 2312.06353)."""

    seeds: int = option(4096, "K, the number of seeded directions.", low=2, high=2**20)
    pool: str = option("walsh", "Kind of directions.", choices=("walsh", "gaussian"))
    tune: str = option("", "Regular expression: only parameters with a match in their name are tuned; empty for all.")
    local_steps: int = option(200, "tau, zeroth-order steps of a node in a round.", low=1, high=100_000)
    lr: float = option(1e-4, "eta, step size along one direction.", above=0.0)
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
    eps: float = option(1e-3, "epsilon, distance of the two loss evaluations from the weights.", above=0.0)
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


@dataclass(frozen=True)
class FedCyBGDConfig:
    """FedCyBGD (arXiv 2406.11187): one node trains one block in turn. A round is one turn."""

    order: str = option(
        "ascending", "Order in which a cycle visits the blocks.", choices=("ascending", "descending", "random")
    )
    local_steps: int = option(
        0, "AdamW steps of a turn; 0 takes examples / (batch size x blocks), held within 50 and 100.", low=0
    )
    lr: float = option(1e-3, "Learning rate of the local AdamW.", above=0.0)
    weight_decay: float = option(0.0, "Weight decay of the local AdamW.", low=0.0)
    gamma: float = option(1.0, "Server step: the block moves by gamma times the node's update.", above=0.0)
    rest: str = option("int8", "Coding of the frozen blocks on the wire.", choices=("none", "bf16", "int8"))
    train_embeddings: bool = option(True, "Visit the embedding, final norm and head blocks too.")
    layers_per_block: int = option(1, "Transformer layers in one block.", low=1)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation beside the SuperLink, on the operator's own held-out data."""

    data: str = option("", "File of held-out examples on the server; empty for no evaluation.")
    format: str = option(
        "auto",
        "Format of that file.",
        choices=("auto", "text", "messages", "prompt-completion", "dolly", "alpaca", "natural-instructions"),
    )
    every: int = option(1, "Rounds from one evaluation of the loss to the next; the last round always has one.", low=1)
    batch_size: int = option(32, "Examples in one batch of the evaluation.", low=1)
    max_examples: int = option(1024, "Most held-out examples used for the loss.", low=1)
    answers: int = option(
        64, "Examples answered greedily for Rouge-L, before the first and after the last round.", low=0
    )
    max_new_tokens: int = option(64, "Longest greedy answer in tokens.", low=1)


@dataclass(frozen=True)
class RunDirConfig:
    """Where the server keeps the run."""

    dir: str = option(
        "", "Folder of the run's ledger and export; empty for $FEDTUNE_HOME/runs/<run id> (default ~/.fedtune)."
    )
    resume: str = option(
        "auto",
        "What to do with a ledger that is there: go on with it, insist on one, or refuse.",
        choices=("auto", "always", "never"),
    )


@dataclass(frozen=True)
class Config:
    """A checked run configuration; see `parse`."""

    num_server_rounds: int = option(10, "Rounds of the run; for FedCyBGD the number of turns.", low=1)
    method: MethodConfig = MethodConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    round: RoundConfig = RoundConfig()
    fedkseed: FedKSeedConfig = FedKSeedConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    fedcybgd: FedCyBGDConfig = FedCyBGDConfig()
    eval: EvalConfig = EvalConfig()
    run: RunDirConfig = RunDirConfig()


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
        Key(name, kind, typing.cast(Scalar, spec.default), spec.metadata["help"], _accepted(kind, spec))
        for name, kind, spec in _options()
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
    options = {name: (kind, spec) for name, kind, spec in _options()}
    for name in flat:
        if name not in options:
            raise ConfigError(_unknown(name, options))
    values = {name: _checked(name, flat[name], *options[name]) for name in flat}
    config = _build(Config, "", values)
    _check_together(config)
    return config


def as_toml() -> str:
    """Render the ``[tool.flwr.app.config]`` table, without its heading."""
    return "".join(f"{key.name} = {_toml(key.default)}\n" for key in keys())


def _options(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        name = prefix + spec.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[spec.name]):
            yield from _options(hints[spec.name], name + ".")
        else:
            yield name, hints[spec.name], spec


def _build(cls: type, prefix: str, values: Mapping[str, Scalar]) -> Any:
    hints = typing.get_type_hints(cls)
    given = {}
    for spec in dataclasses.fields(cls):
        name = prefix + spec.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[spec.name]):
            given[spec.name] = _build(hints[spec.name], name + ".", values)
        elif name in values:
            given[spec.name] = values[name]
    return cls(**given)


def _checked(name: str, value: Any, kind: type[Any], spec: dataclasses.Field) -> Scalar:
    if kind is float and type(value) is int:
        value = float(value)
    limits = spec.metadata
    if (
        type(value) is not kind
        or (limits["choices"] and value not in limits["choices"])
        or (kind in (int, float) and not (limits["low"] <= value <= limits["high"] and value > limits["above"]))
        or (kind is float and not math.isfinite(value))
    ):
        raise ConfigError(f"run config: '{name}' is {value!r}, but must be {_accepted(kind, spec)}.")
    return value


def _check_together(config: Config) -> None:
    if config.strategy.min_replies > config.strategy.min_nodes and config.method.name != "fedcybgd":
        raise ConfigError(
            f"run config: 'strategy.min-replies' is {config.strategy.min_replies}, but must be at most "
            f"'strategy.min-nodes' ({config.strategy.min_nodes}): raise the one or lower the other."
        )
    seeds = config.fedkseed
    if config.privacy.clip and (
        config.method.name == "fedcybgd" or seeds.estimator != "two-sided" or seeds.directions > 1
    ):
        raise ConfigError(
            "run config: 'privacy.clip' works with FedKSeed, 'fedkseed.estimator' = \"two-sided\" and "
            "'fedkseed.directions' = 1 alone: set these, or 'privacy.clip' to 0."
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


def _unknown(name: str, options: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see `fedtune config` for all keys."
    return f"run config: unknown key {name!r}; {hint}"


def _accepted(kind: type, spec: dataclasses.Field) -> str:
    limits = spec.metadata
    if limits["choices"]:
        return "one of " + ", ".join(f"'{choice}'" for choice in limits["choices"])
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    bounds = []
    if limits["above"] > -math.inf:
        bounds.append(f"above {limits['above']:g}")
    if limits["low"] > -math.inf:
        bounds.append(f"at least {limits['low']:g}")
    if limits["high"] < math.inf:
        bounds.append(f"at most {limits['high']:g}")
    return " ".join([words, " and ".join(bounds)]).strip()


def _toml(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
