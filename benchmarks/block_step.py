"""What does a local step on one block cost, against AdamW on all parameters? Prints a Markdown table.

    python benchmarks/block_step.py [--layers 12] [--hidden 768] [--vocabulary 32000] [--batch 2] [--length 128]

A random Llama (109.5 M parameters by default) in float32, with tied embeddings. Every row is a process of its own: all
parameters, or one layer as block. Seconds are processor time of a step, the median of the steps after the first, so
that other work on the machine counts little. Memory is the process's peak resident size less its size before the model
was made; the needed memory is what the node holds of the rest + 16 bytes × the block's parameters + what autograd keeps
of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune_strategies.blocks.codecs import encode, encoded_size, parse_codec
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.held import coded_loader, empty_model, held_outside
from fedtune_strategies.blocks.train import train_block

LOW, MIDDLE, TOP = 0.0, 0.5, 1.0
ROWS = [
    ("all parameters", {}, [None]),
    ("block", {"rest": "none"}, [LOW, MIDDLE, TOP]),
    ("block, checkpoints", {"rest": "none", "checkpoint": True}, [LOW]),
    ("block, cached prefix", {"rest": "none", "cache_bytes": 2**30}, [MIDDLE, TOP]),
    ("block, rest held as int8", {"rest": "int8"}, [LOW, MIDDLE, TOP]),
    ("block, rest held as int8, checkpoints", {"rest": "int8", "checkpoint": True}, [LOW]),
    ("block, rest held as nf4, checkpoints", {"rest": "nf4", "checkpoint": True}, [LOW]),
]
# Large blocks go back to the system as soon as they are freed, so that peaks are what is needed and not what is kept.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure(args, *json.loads(args.child))))
        return
    print("| trained | layer | seconds a step | of all | peak memory, MB | of all | needed, MB | peak / needed |")
    print("|---|---|---|---|---|---|---|---|")
    whole = None
    for name, way, places in ROWS:
        for place in places:
            layer = None if place is None else round(place * (args.layers - 1))
            command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--child", json.dumps([way, layer])]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
            result = json.loads(child.stdout)
            whole = whole or result
            print(
                f"| {name} | {'' if layer is None else layer} | {result['seconds']:.2f} "
                f"| {result['seconds'] / whole['seconds']:.2f} | {result['memory'] / 1e6:.0f} "
                f"| {result['memory'] / whole['memory']:.2f} | {result['needed'] / 1e6:.0f} "
                f"| {result['memory'] / result['needed']:.2f} |",
                flush=True,
            )


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
    kept: dict[int, int] = {}

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        starts.append(time.process_time())
        if len(starts) > 1:
            return model(input_ids=batch, labels=batch, use_cache=False).loss
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def note(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            return model(input_ids=batch, labels=batch, use_cache=False).loss

    train_all(LlamaForCausalLM(LlamaConfig(64, 48, 96, 1, 12)), lambda m, b: m(b, labels=b).loss, batch % 64, 2)
    before = psutil.Process().memory_info().rss
    if layer is None:
        model = LlamaForCausalLM(config)
        held, trained = 0, model.num_parameters()
        train_all(model, loss_fn, batch, args.steps + 2)
    else:
        held, trained = train_one(config, way, layer, loss_fn, batch, args.steps + 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = statistics.median(later - earlier for earlier, later in itertools.pairwise(starts[1:]))
    return {"seconds": seconds, "memory": peak - before, "needed": held + 16 * trained + sum(kept.values())}


def train_all(model: nn.Module, loss_fn, batch: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def train_one(config: LlamaConfig, way: dict, layer: int, loss_fn, batch: Tensor, steps: int) -> tuple[int, int]:
    """Train one layer; return the bytes in which the rest was held, and the block's parameters."""
    options = dict(way)
    codec = parse_codec(options.pop("rest"))
    model = empty_model(lambda: LlamaForCausalLM(config))
    block = next(block for block in find_blocks(model) if block.layer == layer)
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = torch.ones(parameter.shape) if parameter.dim() == 1 else torch.randn(parameter.shape) * 0.02
        if name in block.parameters or parameter.dim() == 1 or codec.quantisation == "none":
            parameter.data = value
        else:
            parts |= encode({name: value}, codec)
    outside = {part.partition(":")[0] for part in parts}
    with held_outside(model, outside, coded_loader(parts)):
        train_block(model, block, loss_fn, [batch], steps, 1e-4, **options)
    inside = sum(p.nbytes for n, p in model.named_parameters() if n not in outside and n not in block.parameters)
    return encoded_size(parts) + inside, sum(model.get_parameter(name).numel() for name in block.parameters)


if __name__ == "__main__":
    main()
