"""The keys of FedCyBGD."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune_strategies.blocks.notation import parse_codec
from fedtune_strategies.config.options import option
from fedtune_strategies.config.sections import StrategyConfig
from fedtune_strategies.errors import ConfigError


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
        "ascending",
        "Order in which a cycle visits the blocks.",
        choices=("ascending", "descending", "random", "importance"),
    )
    importance: str = option(
        "loss",
        "What makes a block important: by how much its turns lowered the loss, or the norm of its gradient.",
        choices=("loss", "gradient"),
    )
    local_steps: int = option(
        0, "AdamW steps of a turn; 0 takes examples / (batch size x blocks), held within 50 and 100.", low=0
    )
    lr: float = option(1e-3, "Learning rate of the local AdamW.", above=0.0)
    lr_schedule: str = option(
        "constant", "Learning rate over the rounds of the run.", choices=("constant", "linear", "cosine")
    )
    warmup: float = option(0.0, "Share of the rounds over which the learning rate rises.", low=0.0, high=0.9)
    beta1: float = option(
        0.9,
        "Momentum of the local AdamW (decay of its first moment), anew in each turn.",
        low=0.0,
        high=0.999,
    )
    weight_decay: float = option(0.0, "Weight decay of the local AdamW.", low=0.0)
    gamma: float = option(1.0, "Server step: the block moves by gamma times the node's update.", above=0.0)
    rest: str = option(
        "int8",
        "Coding of the frozen blocks: none, bf16, int8 or nf4, with prune:S or wanda:S, and drop:N, joined by +.",
    )
    calibration: str = option("", "File of text on the server by which wanda and drop choose.")
    upload: str = option("float32", "Coding of the block's change.", choices=("float32", "bf16", "int8"))
    stale: str = option(
        "refuse",
        "What becomes of a change that comes after another node's of the same block, a round late at most: it is left "
        "out, added with the weight of 'strategy.late', or averaged with the block by that weight.",
        choices=("refuse", "rebase", "average"),
    )
    prefetch: bool = option(True, "Send the next node what it lacks while the present one trains.")
    train_embeddings: bool = option(True, "Visit the embedding, final norm and head blocks too.")
    final_norm: str = option(
        "last-layer", "Block of the final norm: that of the last layer, or its own.", choices=("last-layer", "own")
    )
    layers_per_block: int = option(1, "Transformer layers in one block.", low=1)
    split: str = option("none", "Cut each layer into two blocks.", choices=("none", "attention-mlp"))
    adapters: bool = option(
        False, "Train LoRA adapters alone; 'fedavg.rank', 'fedavg.alpha' and 'fedavg.targets' say which."
    )
    hold: str = option(
        "decoded",
        "Frozen blocks on a node: as weights, coded in memory, or coded on disk; coded ones are decoded when used.",
        choices=("decoded", "coded", "disk"),
    )
    autocast: str = option(
        "none", "Type in which a node computes matrix products.", choices=("none", "bfloat16", "float16")
    )
    checkpoint: bool = option(False, "Compute activations again in the backward pass instead of keeping them.")
    accumulate: int = option(1, "Batches whose mean gradient makes one local step.", low=1)
    optimizer: str = option("adamw", "State of the local AdamW: in 32 bits, or in 8.", choices=("adamw", "adamw-8bit"))
    cache_mb: float = option(
        0.0,
        "Most MB of memory for hidden states of the frozen layers below the block, if batches come again.",
        low=0.0,
    )


def check_fedcybgd(settings: FedCyBGDConfig, nodes: StrategyConfig) -> None:
    """Check the keys that must go together.

    Raises
    ------
    ConfigError
        They do not.
    """
    codec = parse_codec(settings.rest)
    if (codec.wanda or codec.drop) and not settings.calibration:
        raise ConfigError(
            f"run config: 'fedcybgd.rest' is {settings.rest!r}, which chooses by text of the server: "
            "name a file in 'fedcybgd.calibration'."
        )
    if settings.split != "none" and settings.layers_per_block > 1:
        raise ConfigError(
            f"run config: 'fedcybgd.layers-per-block' is {settings.layers_per_block}, but must be 1 "
            f"where 'fedcybgd.split' is '{settings.split}'."
        )
    if settings.structure == "sequential" and settings.nodes_per_round > 1:
        raise ConfigError(
            f"run config: 'fedcybgd.nodes-per-round' is {settings.nodes_per_round}, but must be 1 "
            "where 'fedcybgd.structure' is 'sequential'."
        )
    if settings.structure == "parallel" and nodes.min_replies > 1:
        raise ConfigError(
            f"run config: 'strategy.min-replies' is {nodes.min_replies}, but must be 1 where 'fedcybgd.structure' is "
            "'parallel': blocks that did not come are trained in the next round."
        )
    if settings.stale != "refuse" and not nodes.late:
        raise ConfigError(
            f"run config: 'fedcybgd.stale' is '{settings.stale}', which needs a weight of late changes: "
            "set 'strategy.late' above 0, or 'fedcybgd.stale' to 'refuse'."
        )
    if not nodes.min_replies <= settings.nodes_per_round <= nodes.min_nodes:
        raise ConfigError(
            f"run config: 'fedcybgd.nodes-per-round' is {settings.nodes_per_round}, but must be at least "
            f"'strategy.min-replies' ({nodes.min_replies}) and at most 'strategy.min-nodes' ({nodes.min_nodes})."
        )
