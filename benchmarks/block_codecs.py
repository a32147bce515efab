"""What does compressing the frozen rest cost? Prints a Markdown table, one row per codec.

    python benchmarks/block_codecs.py [MODEL [DATA_FILE]] [--held-out 64] [--batches 4]

Without arguments: the embedded model and its own held-out data. Each decoder layer in turn is the responsible block: it
stays exact, the rest is coded and decoded. Shown over all these turns: bytes of the whole rest on the wire, bytes a
node holds of it (in coded form, or decoded to bfloat16), largest error of a weight, mean held-out perplexity, and the
lowest and mean cosine between the block's gradient under the codec and the exact one. Layer influence
is measured on the batches of the gradient, that is, not on the held-out examples.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch

from fedtune_strategies.blocks.codec_config import Codec, parse_codec
from fedtune_strategies.blocks.codecs import decode, encode, encoded_size
from fedtune_strategies.blocks.find import Block, find_blocks
from fedtune_strategies.blocks.gradients import block_gradients
from fedtune_strategies.blocks.rest import (
    compressed_rest,
    dropped_layers,
    gradient_cosine,
    layer_influence,
)
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.evaluation import evaluate_loss
from fedtune_strategies.language.examples import batches, tokenise
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import load_model
from fedtune_strategies.tiny.tasks import write_federation

CODECS = (
    "none",
    "bf16",
    "int8",
    "nf4",
    "prune:0.3",
    "prune:0.5",
    "drop:1",
    "drop:1+int8",
    "drop:1+nf4",
)
SEQ_LENGTH, BATCH = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fedtune-tiny")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or embedded_data(Path(folder))
        rows = read_rows(data)
    random.Random(0).shuffle(rows)
    language = load_model(args.model)
    model = language.model.eval()
    held_out = tokenise(rows[: args.held_out], language.tokenizer, SEQ_LENGTH)
    train = tokenise(rows[args.held_out : args.held_out + 8 * BATCH * args.batches], language.tokenizer, SEQ_LENGTH)
    chosen = list(batches(train, BATCH, args.batches, ("block codecs",)))
    influence = layer_influence(model, chosen, response_loss)
    blocks = [block for block in find_blocks(model) if block.kind == "layer"]
    exact = [gradient(model, block, chosen) for block in blocks]

    print(f"{args.model}: {model.num_parameters():,} parameters, influence {[round(i, 3) for i in influence]}\n")
    print("| codec | wire, % of bf16 | held, % of bf16 | largest error | perplexity | cosine, lowest | cosine, mean |")
    print("|---|---|---|---|---|---|---|")
    for name in CODECS:
        codec = parse_codec(name)
        if codec.drop > len(influence) - 3:
            continue
        wire: list[float] = []
        held: list[float] = []
        error: list[float] = []
        perplexity, cosine = [], []
        for block, before in zip(blocks, exact, strict=True):
            for values, value in zip((wire, held, error), sizes(model, block, codec, influence), strict=True):
                values.append(value)
            with compressed_rest(model, block, codec, influence):
                perplexity.append(evaluate_loss(model, held_out).perplexity)
                cosine.append(gradient_cosine(before, gradient(model, block, chosen)))
        print(
            f"| {name} | {statistics.mean(wire):.1%} | {statistics.mean(held):.1%} | {max(error):.3g} "
            f"| {statistics.mean(perplexity):.3f} | {min(cosine):.4f} | {statistics.mean(cosine):.4f} |",
            flush=True,
        )


def embedded_data(folder: Path) -> Path:
    node_files, _ = write_federation(folder, nodes=1)
    return node_files[0]


def gradient(model: torch.nn.Module, block: Block, chosen: list) -> dict[str, torch.Tensor]:
    with block_gradients(model, block, response_loss, chosen) as gradient_of:
        return dict(zip(block.parameters, gradient_of(range(len(chosen))).tensors, strict=True))


def sizes(model: torch.nn.Module, block: Block, codec: Codec, influence: list[float]) -> tuple[float, float, float]:
    """Bytes on the wire and held, as shares of the rest in bfloat16, and the largest error of a weight."""
    dropped = dropped_layers(influence, codec.drop, block) if codec.drop else ()
    absent = {name for other in find_blocks(model) if other.layer in dropped for name in other.parameters}
    rest = {name: value.detach() for name, value in model.named_parameters() if name not in block.parameters}
    sent = {name: value for name, value in rest.items() if name not in absent}
    parts = encode(sent, codec)
    error = max((value - sent[name]).abs().max().item() for name, value in decode(parts).items())
    bf16 = sum(2 * value.numel() for value in rest.values())
    unpacked = sum(2 * value.numel() for value in sent.values())
    return encoded_size(parts) / bf16, min(encoded_size(parts), unpacked) / bf16, error


if __name__ == "__main__":
    main()
