"""How many bytes does a turn take on a model of 109.5 million parameters? Prints two Markdown tables.

    python benchmarks/block_bytes.py

The messages of a turn, made by the protocol's own encoder, for one layer of a Llama of width 768 with 12 layers: the
reply in every upload coding, against the block's elements in that coding; and the task of a node in steady state, when
the other nodes of its circle have each trained another layer since its last turn, against the model in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedtune_strategies.blocks.codec_config import UPLOAD_WIDTHS, UPLOADS, parse_codec
from fedtune_strategies.blocks.codecs import encode
from fedtune_strategies.blocks.uploads import encode_with_feedback
from fedtune_strategies.fedcybgd.messages import BlockReply, BlockTask
from fedtune_strategies.protocol import messages as protocol

HIDDEN, INNER, LAYERS, VOCABULARY = 768, 2048, 12, 32_000


def main() -> None:
    """Encode and count."""
    torch.set_num_threads(1)
    block = layer(0)
    elements = sum(value.numel() for value in block.values())
    model = 2 * (LAYERS * elements + HIDDEN + VOCABULARY * HIDDEN)
    print("| upload | bytes | of the block in this coding |\n|---|---|---|")
    for name, codec in UPLOADS.items():
        parts, _ = encode_with_feedback(block, {}, codec)
        reply = BlockReply("node-1", 20, 1.0, "0" * 16, 100, 1.0, 10**9, 3, 4, parts, 50, 0)
        size = len(protocol.encode(reply))
        print(f"| {name} | {size:,} | {size / (UPLOAD_WIDTHS[name] * elements):.4f} |")
    print("\n| rest | nodes | bytes | of the model in bfloat16 |\n|---|---|---|---|")
    for rest in ("int8", "nf4"):
        for nodes in (2, 4, 5, 8, LAYERS):
            others = encode({n: v for index in range(1, nodes) for n, v in layer(index).items()}, parse_codec(rest))
            size = len(protocol.encode(turn(block, others)))
            print(f"| {rest} | {nodes} | {size:,} | {size / model:.3f} |")


def turn(block: dict[str, Tensor], others: dict[str, Tensor]) -> BlockTask:
    """Make a node's task: its block exactly, and others coded."""
    versions, none = torch.zeros(LAYERS + 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    return BlockTask(20, 0, versions, block, others, 1e-3, dropped=none, committed=16)


def layer(index: int) -> dict[str, Tensor]:
    """Make random weights of one decoder layer."""
    random = torch.Generator().manual_seed(index)
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    shapes |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    return {
        f"model.layers.{index}.{name}.weight": torch.randn(shape, generator=random) / 50
        for name, shape in shapes.items()
    }


if __name__ == "__main__":
    main()
