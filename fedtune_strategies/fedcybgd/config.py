"""The keys of FedCyBGD."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtune_strategies.blocks.codec_config import parse_codec
from fedtune_strategies.config import AdamWTrainConfig, Config, LoraConfig, StrategyConfig, option
from fedtune_strategies.errors import ConfigError


@dataclass(frozen=True)
class TurnTrainConfig(AdamWTrainConfig):
    """Local steps of a turn."""

    local_steps: int = option(
        0, "AdamW steps of a turn; 0 takes examples / (batch size x blocks), held within 50 and 100.", low=0
    )


@dataclass(frozen=True)
class TurnStrategyConfig(StrategyConfig):
    """How changes of a block become its next version."""

    server_lr: float = option(1.0, "gamma: the block moves by this much of the node's change.", above=0.0)
    late: float = option(
        0.0,
        "A change that comes a round late, after another node's of the same block, is added with this weight; 0 leaves "
        "it out.",
        low=0.0,
        high=1.0,
    )


@dataclass(frozen=True)
class FedCyBGDConfig:
    """FedCyBGD (arXiv 2406.11187): nodes train one block of the model in turn."""

    structure: str = option(
        "sequential",
        "What a round is: one node on one block; several nodes on a block each, from one snapshot; or several nodes on "
        "one block, averaged.",
        choices=("sequential", "parallel", "averaged"),
    )
    nodes_per_round: int = option(1, "Nodes that train in a round of the last two structures.", low=1)
    order: str = option(
        "ascending", "Order in which a cycle visits the blocks.", choices=("ascending", "descending", "random")
    )
    rest: str = option(
        "int8", "Coding of the frozen blocks: none, bf16, int8 or nf4, with prune:S and drop:N, joined by +."
    )
    calibration: str = option("", "File of text on the server by which drop chooses layers.", path=True)
    prefetch: bool = option(True, "Send the next node what it lacks while the present one trains.")
    train_embeddings: bool = option(True, "Visit the embedding and head blocks too.")
    layers_per_block: int = option(1, "Transformer layers in one block.", low=1)
    adapters: bool = option(False, "Train LoRA adapters alone; the 'lora' keys say which.")
    autocast: str = option(
        "none", "Type in which a node computes matrix products.", choices=("none", "bfloat16", "float16")
    )
    accumulate: int = option(1, "Batches whose mean gradient makes one local step.", low=1)


@dataclass(frozen=True)
class FedCyBGDRunConfig(Config):
    """A run of FedCyBGD; its rounds are turns."""

    train: TurnTrainConfig = field(default_factory=TurnTrainConfig)
    strategy: TurnStrategyConfig = field(default_factory=TurnStrategyConfig)
    fedcybgd: FedCyBGDConfig = field(default_factory=FedCyBGDConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check(self) -> None:
        """See `Config.check`."""
        own, nodes = self.fedcybgd, self.strategy
        if parse_codec(own.rest).drop and not own.calibration:
            raise ConfigError(
                f"run config: 'fedcybgd.rest' is {own.rest!r}, which chooses by text of the server: "
                "name a file in 'fedcybgd.calibration'."
            )
        if own.structure == "sequential" and own.nodes_per_round > 1:
            raise ConfigError(
                f"run config: 'fedcybgd.nodes-per-round' is {own.nodes_per_round}, but must be 1 "
                "where 'fedcybgd.structure' is 'sequential'."
            )
        if own.structure == "parallel" and nodes.min_replies > 1:
            raise ConfigError(
                f"run config: 'strategy.min-replies' is {nodes.min_replies}, but must be 1 where 'fedcybgd.structure' "
                "is 'parallel': blocks that did not come are trained in the next round."
            )
        if not nodes.min_replies <= own.nodes_per_round <= nodes.min_nodes:
            raise ConfigError(
                f"run config: 'fedcybgd.nodes-per-round' is {own.nodes_per_round}, but must be at least "
                f"'strategy.min-replies' ({nodes.min_replies}) and at most 'strategy.min-nodes' ({nodes.min_nodes})."
            )
