"""What does a local step on one block cost, against AdamW on all parameters? Prints a Markdown table.

    python benchmarks/block_step.py [--layers 12] [--hidden 768] [--vocabulary 32000] [--batch 2] [--length 128]

A random Llama (109.5 M parameters by default) in float32, with tied embeddings. Every row is its own process: all
parameters, or one layer as block. Seconds are processor time of a step, the median of the steps after the first, so
that other work on the machine counts little. Memory is the process's peak resident size less its size before the model
was made. What is needed is what the process holds of the rest, 16 bytes for each trained parameter, and activations:
the growth during one forward and backward pass of the plain float32 model, less the gradients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune_strategies.blocks.codec_config import Codec, parse_codec
from fedtune_strategies.blocks.codecs import encode, encoded_size
from fedtune_strategies.blocks.find import Block, find_blocks
from fedtune_strategies.blocks.frozen import FrozenBlocks
from fedtune_strategies.blocks.gradients import LossFn, block_gradients
from fedtune_strategies.blocks.offload import empty_model
from fedtune_strategies.blocks.train import train_block
from fedtune_strategies.memory import prefer_memory

LOW, MIDDLE, TOP = 0.0, 0.5, 1.0
ROWS: list[tuple[str, dict[str, Any], list[float | None]]] = [
    ("all parameters", {}, [None]),
    ("block", {"rest": "none"}, [LOW, MIDDLE, TOP]),
    ("block, checkpoints", {"rest": "none", "checkpoint": True}, [LOW]),
    ("block, cached prefix", {"rest": "none", "cache_bytes": 2**30}, [MIDDLE, TOP]),
    ("block, rest held as int8", {"rest": "int8"}, [LOW, MIDDLE, TOP]),
    ("block, rest held as int8, checkpoints", {"rest": "int8", "checkpoint": True}, [LOW]),
    ("block, rest held as nf4, checkpoints", {"rest": "nf4", "checkpoint": True}, [LOW]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows that contain this, beside the first")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure(args, *json.loads(args.child))))
        return
    print("| trained | layer | seconds a step | of all | peak memory, MB | of all | needed, MB | peak / needed |")
    print("|---|---|---|---|---|---|---|---|")
    whole: dict[str, float] = {}
    for name, way, places in [ROWS[0], *(row for row in ROWS[1:] if args.only in row[0])]:
        for place in places:
            layer = None if place is None else round(place * (args.layers - 1))
            result = in_child(way, layer)
            passes = in_child({"passes": True, "checkpoint": way.get("checkpoint", False)}, layer)
            needed = result["held"] + 16 * result["trained"] + passes["activations"]
            whole = whole or result
            print(
                f"| {name} | {'' if layer is None else layer} | {result['seconds']:.2f} "
                f"| {result['seconds'] / whole['seconds']:.2f} | {result['memory'] / 1e6:.0f} "
                f"| {result['memory'] / whole['memory']:.2f} | {needed / 1e6:.0f} | {result['memory'] / needed:.2f} |",
                flush=True,
            )


def in_child(way: dict, layer: int | None) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--child", json.dumps([way, layer])]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout)


def measure(args: argparse.Namespace, way: dict, layer: int | None) -> dict[str, float]:
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    batch = torch.randint(0, config.vocab_size, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    starts: list[float] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        starts.append(time.process_time())
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    prefer_memory()  # so that peaks are what is needed and not what is kept
    warm_up()
    before = psutil.Process().memory_info().rss
    options = dict(way)
    codec = parse_codec(options.pop("rest", "none"))
    model, frozen, held = filled_model(config, codec, layer)
    block = whole_model(model) if layer is None else next(b for b in find_blocks(model) if b.layer == layer)
    if options.pop("passes", False):
        filled = psutil.Process().memory_info().rss
        with block_gradients(model, block, loss_fn, [batch], **options) as gradient:
            gradient([0])
        trained = sum(model.get_parameter(name).numel() for name in block.parameters)
        return {"activations": peak_memory() - filled - 4 * trained}
    if layer is None:
        train_all(model, loss_fn, batch, args.steps + 2)
    else:
        with frozen.in_use(block.parameters):
            train_block(model, block, loss_fn, [batch], args.steps + 2, 1e-4, **options)
    return {
        "seconds": statistics.median(later - earlier for earlier, later in itertools.pairwise(starts[1:])),
        "memory": peak_memory() - before,
        "held": held - sum(model.get_parameter(name).nbytes for name in block.parameters),
        "trained": sum(model.get_parameter(name).numel() for name in block.parameters),
    }


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def whole_model(model: nn.Module) -> Block:
    return Block(0, "all", "embedding", tuple(name for name, _ in model.named_parameters()))


def filled_model(config: LlamaConfig, codec: Codec, layer: int | None) -> tuple[nn.Module, FrozenBlocks, int]:
    """A model that holds only what is exact, the coded form of its other matrices, and their bytes; never whole."""
    model = empty_model(lambda: LlamaForCausalLM(config))
    exact = {name for block in find_blocks(model) if block.layer == layer for name in block.parameters}
    coded = {n for n, p in model.named_parameters() if codec != Codec() and n not in exact and p.dim() > 1}
    frozen, held = FrozenBlocks(model, coded, "coded"), 0
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape).normal_(0, 0.02) if parameter.dim() > 1 else torch.ones(parameter.shape)
        if name in coded:
            parts = encode({name: value}, codec)
            frozen.put(parts)
            held += encoded_size(parts)
        else:
            parameter.data = value
            held += value.nbytes
    return model, frozen, held


def warm_up() -> None:
    """Load what torch and transformers load at first use, so that it is not counted."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    batch = torch.arange(64).view(1, 64)
    train_all(LlamaForCausalLM(config), lambda model, batch: model(batch, labels=batch).loss, batch, 2)


def train_all(model: nn.Module, loss_fn: LossFn, batch: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
