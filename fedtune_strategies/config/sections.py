"""The sections of the run configuration that methods share. A method's own sections stand in its folder."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune_strategies.blocks.codec_config import UPLOADS
from fedtune_strategies.config.options import option
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.installed import installed_methods
from fedtune_strategies.stream.offer import is_address


@dataclass(frozen=True)
class MethodConfig:
    """Which algorithm tunes the model."""

    name: str = option(
        "fedkseed",
        "Tuning method: one of FedTune's, or of an installed package.",
        choices=installed_methods,
    )


@dataclass(frozen=True)
class ModelConfig:
    """The base model, the same on every node."""

    name: str = option(
        "fedtune-tiny", "Hugging Face causal LM: a folder, a Hub id, or the embedded model 'fedtune-tiny'."
    )
    dtype: str = option(
        "auto",
        "Type of the weights in memory and in the export; 'auto': that of the model's files.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    base: str = option(
        "exact",
        "What of the model's matrices the base model keeps: all, or what int8 or nf4 leaves of them, so that nodes can "
        "hold it coded.",
        choices=("exact", "int8", "nf4"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """How a node reads its data; every method has these keys."""

    seq_length: int = option(256, "Longest sequence in tokens, prompt and response together.", low=8)
    batch_size: int = option(8, "Examples in one local step.", low=1)
    seed: int = option(0, "Seed of the run: directions, draws, batches and node sampling.", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class LocalTrainConfig(TrainConfig):
    """Local steps and their step size, for methods that have both; a method may set other defaults."""

    local_steps: int = option(50, "Local steps of a node in a round.", low=1, high=100_000)
    lr: float = option(1e-3, "Step size of a local step.", above=0.0)
    lr_schedule: str = option(
        "constant", "Step size over the rounds, after the warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup: float = option(0.0, "Share of the run over which the step size rises.", low=0.0, high=0.9)


@dataclass(frozen=True)
class AdamWTrainConfig(LocalTrainConfig):
    """Local steps of AdamW, whose moments start at zero in every round."""

    beta1: float = option(0.9, "Momentum: decay of AdamW's first moment.", low=0.0, high=0.999)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", low=0.0)
    upload: str = option(
        "bf16",
        "Coding of a node's change on its way up; 'sign' is one bit a value. What int8 and sign lose, the node adds to "
        "its next.",
        choices=tuple(UPLOADS),
    )


@dataclass(frozen=True)
class StrategyConfig:
    """Which nodes take part and how their replies are weighed."""

    min_nodes: int = option(1, "Fewest nodes that must be present before a round starts.", low=1)
    nodes: str = option("", "Names of the nodes that may take part, with commas between; empty for all members.")
    min_replies: int = option(1, "Fewest accepted replies with which a round counts.", low=1)
    weighting: str = option(
        "examples", "Weight of a reply: its node's number of examples, or equal.", choices=("examples", "uniform")
    )


@dataclass(frozen=True)
class SamplingConfig(StrategyConfig):
    """For methods that ask a sample of the nodes."""

    fraction_train: float = option(1.0, "Fraction of the known nodes asked in a round.", above=0.0, high=1.0)


@dataclass(frozen=True)
class RobustConfig(SamplingConfig):
    """For methods whose replies a Flower strategy aggregates."""

    aggregation: str = option(
        "fedavg",
        "The Flower strategy that aggregates the replies.",
        choices=("fedavg", "fedmedian", "trimmed-mean", "krum"),
    )
    trim: float = option(0.2, "Part of the replies that trimmed-mean cuts off at either end.", low=0.0, high=0.49)
    faulty_nodes: int = option(1, "Nodes that krum expects to be faulty.", low=0)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685), for methods that train them."""

    rank: int = option(8, "Rank of the adapters.", low=1)
    alpha: int = option(16, "Adapters are scaled by alpha / rank.", low=1)
    targets: str = option(
        "",
        "Modules that get an adapter, as PEFT takes them: 'all-linear', a regular expression of their names, or empty "
        "for PEFT's choice for the architecture.",
    )


@dataclass(frozen=True)
class RoundConfig:
    """How long a round waits."""

    deadline: float = option(600.0, "Seconds after which a round ends without the replies still missing.", above=0.0)
    grace: float = option(
        0.0,
        "Seconds to wait for further replies once 'strategy.min-replies' are there; 0 waits until the deadline.",
        low=0.0,
    )
    node_wait: float = option(120.0, "Seconds to wait for 'strategy.min-nodes' nodes before giving up.", low=0.0)
    first_nodes: int = option(
        0,
        "Nodes for which the first round waits, up to 'round.node-wait' seconds; `fedtune run` takes those online.",
        low=0,
    )
    attempts: int = option(3, "How often a round with too few replies is tried before the run ends.", low=1)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation beside the SuperLink, on the operator's own held-out data."""

    data: str = option("", "File of held-out examples on the server; empty for no evaluation.", path=True)
    format: str = option(
        "auto",
        "Format of that file.",
        choices=(
            "auto",
            "text",
            "messages",
            "conversations",
            "prompt-completion",
            "dolly",
            "alpaca",
            "natural-instructions",
        ),
    )
    every: int = option(1, "Rounds from one evaluation of the loss to the next; the last round always has one.", low=1)
    batch_size: int = option(32, "Examples in one batch of the evaluation.", low=1)
    max_examples: int = option(1024, "Most held-out examples used for the loss.", low=1)
    answers: int = option(
        64, "Examples answered greedily for Rouge-L, before the first and after the last round.", low=0
    )
    max_new_tokens: int = option(64, "Longest greedy answer in tokens.", low=1)


@dataclass(frozen=True)
class RunConfig:
    """Where the server keeps the run, when it ends, and which round it keeps."""

    dir: str = option(
        "",
        "Folder of the run's ledger and export; empty for $FEDTUNE_HOME/runs/<run id> (default ~/.fedtune).",
        path=True,
    )
    purpose: str = option("", "Why, in one line: the owners of the nodes read it before they agree.")
    resume: str = option(
        "auto",
        "What to do with a ledger that is there: continue it, insist on one, or refuse.",
        choices=("auto", "always", "never"),
    )
    divergence: float = option(
        1.0,
        "The run stops, and keeps its best round, when its held-out loss is so many nats above the lowest three times "
        "in a row; without held-out data the nodes' training loss, each node against its own. 0: never.",
        low=0.0,
    )
    patience: int = option(
        0, "Evaluations in a row without a lower held-out loss after which the run is finished; 0: never.", low=0
    )
    keep: str = option("last", "The round that is exported: the last, or the best by held-out loss.",
                       choices=("last", "best"))  # fmt: skip
    prune: bool = option(
        False,
        "Remove what nodes sent in a round once it is committed, for room: the run can be resumed and exported, but "
        "not replayed.",
    )
    report_to: str = option(
        "none",
        "Experiment tracker on the server, by accelerate's name for it.",
        choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
    )


@dataclass(frozen=True)
class StreamConfig:
    """The streams from the nodes' workers to the run's ServerApp."""

    listen: str = option(
        "",
        "Where the run listens for streams, 'host:port'; empty for behind the port of `fedtune serve`, 'off' for none.",
    )
    address: str = option("", "Where nodes find that, 'host:port'; empty for the same.")

    def check(self) -> None:
        """Check that nodes can be told where to find what is listened on."""
        if self.listen in ("", "off"):
            if self.address:
                raise ConfigError("run config: 'stream.address' is where nodes find 'stream.listen': set that too.")
            return
        for name, value in (("listen", self.listen), ("address", self.address or self.listen)):
            if not is_address(value):
                raise ConfigError(f"run config: 'stream.{name}' is {value!r}, but must be host:port.")
        if not self.address and self.listen.startswith(("0.0.0.0:", "[::]:")):
            raise ConfigError(
                f"run config: nodes cannot find {self.listen!r}: set 'stream.address' to this server's name or address."
            )
