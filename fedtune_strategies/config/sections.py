"""The keys that do not depend on the method."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune_strategies.config.options import option
from fedtune_strategies.method import installed_methods

METHODS = ("fedkseed", "fedkseed-pro", "fedcybgd", "fedavg", "fedit", "fedzo")

# Aggregations that compare replies seed by seed: all nodes draw the same seeds in a round.
COMPARED = ("fedmedian", "trimmed-mean", "krum")


@dataclass(frozen=True)
class MethodConfig:
    """Which algorithm tunes the model."""

    name: str = option(
        "fedkseed",
        "Tuning method: one of FedTune's, or of an installed package.",
        choices=lambda: (*METHODS, *installed_methods()),
    )


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
        choices=("fedavg", "fedavgm", "fedadam", "fedyogi", *COMPARED),
    )
    server_lr: float = option(1.0, "FedKSeed: theta moves by this much of the aggregated move.", above=0.0)
    momentum: float = option(0.9, "Momentum of fedavgm, beta_1 of fedadam and fedyogi.", low=0.0, high=0.9999)
    second_momentum: float = option(0.99, "beta_2 of fedadam and fedyogi.", low=0.0, high=0.99999)
    adaptivity: float = option(1e-2, "tau of fedadam and fedyogi, in units of the step size.", above=0.0)
    trim: float = option(0.2, "Part of the replies that trimmed-mean cuts off at either end.", low=0.0, high=0.49)
    faulty_nodes: int = option(1, "Nodes that krum expects to be faulty.", low=0)
    late: float = option(
        0.0,
        "FedKSeed, FedCyBGD: a reply that comes one round late counts so much of a prompt one; 0 leaves it out.",
        low=0.0,
        high=1.0,
    )
    weight_decay: float = option(
        0.0, "FedKSeed: part by which theta shrinks in a round, towards the base model.", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class RoundConfig:
    """How long a round waits."""

    deadline: float = option(600.0, "Seconds after which a round goes on without the replies still missing.", above=0.0)
    grace: float = option(
        0.0,
        "Seconds to wait for further replies once 'strategy.min-replies' are there; 0 waits until the deadline.",
        low=0.0,
    )
    node_wait: float = option(120.0, "Seconds to wait for 'strategy.min-nodes' nodes before giving up.", low=0.0)
    attempts: int = option(3, "How often a round with too few replies is tried before the run ends.", low=1)


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
    report_to: str = option(
        "none",
        "Experiment tracker on the server, by transformers' name for it.",
        choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
    )
