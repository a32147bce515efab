"""The keys of FedCyBGD."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune_strategies.config.options import option


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
