"""What does a step of the seed-space gradient cost? Prints a Markdown table.

    python benchmarks/seed_gradient.py [--layers 12] [--hidden 768] [--vocabulary 32000] [--batch 2] [--length 128]

A random Llama (109.5 M parameters by default) with tied embeddings. Every figure is from its own process. Memory
is the largest private memory (what the system cannot take back from files) less what the process had before the model:
of one loss without gradient, and of a step, whose W_r is in a mapped file. Seconds are processor time, the median of
the steps after the first: of a checkpointed forward and backward pass of the plain model, and of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune_strategies.blocks.layers import checkpointed
from fedtune_strategies.memory import prefer_memory
from fedtune_strategies.seed_gradient import local_walk, slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.seed_space.moved import MovedWeights
from fedtune_strategies.seed_space.scaled import rms_scales, scaled

INTERVAL = 0.002  # seconds from one reading of the memory to the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure(args, *args.child)))
        return
    print("| weights | inference, MB | step, MB | of inference | passes, s | step, s | of passes |")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        plain, passes, step = (in_child(way, dtype) for way in WAYS)
        print(
            f"| {dtype} | {plain['memory'] / 1e6:.0f} | {step['memory'] / 1e6:.0f} "
            f"| {step['memory'] / plain['memory']:.2f} | {passes['seconds']:.2f} | {step['seconds']:.2f} "
            f"| {step['seconds'] / passes['seconds']:.2f} |",
            flush=True,
        )


def in_child(way: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--child", way, dtype]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(args: argparse.Namespace, way: str, dtype: str) -> dict[str, float]:
    prefer_memory()
    torch.set_default_dtype(getattr(torch, dtype))
    run(way, args, LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1))
    before, readings, done = private_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            readings[0] = max(readings[0], private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = run(way, args, config_of(args))
    done.set()
    watcher.join()
    return {"memory": readings[0] - before, "seconds": statistics.median(seconds[1:])}


def config_of(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )


def run(way: str, args: argparse.Namespace, config: LlamaConfig) -> list[float]:
    """Make a model and take some steps; returns the seconds of each."""
    model = LlamaForCausalLM(config)
    batch = torch.randint(0, config.vocab_size, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    starts = [time.process_time()]
    for _ in WAYS[way](model, batch, args):
        starts.append(time.process_time())
    return [later - earlier for earlier, later in itertools.pairwise(starts)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def inference(model: nn.Module, batch: Tensor, args: argparse.Namespace) -> Iterator[None]:
    with torch.no_grad():
        for _ in range(args.steps + 1):
            loss_of(model, batch)
            yield


def passes(model: nn.Module, batch: Tensor, args: argparse.Namespace) -> Iterator[None]:
    with checkpointed(model.eval(), first=0):
        for _ in range(args.steps + 1):
            loss_of(model, batch).backward()
            model.zero_grad()
            yield


def walk(model: nn.Module, batch: Tensor, args: argparse.Namespace) -> Iterator[None]:
    parameters = tuned_parameters(model)
    base: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    pool = scaled(make_pool("walsh", 0, args.seeds), rms_scales(base))
    weights = MovedWeights(base)
    weights.add(pool, torch.zeros(args.seeds))
    find = partial(slopes, model, parameters, loss_of, pool=pool)
    for _ in range(args.steps + 1):
        local_walk(parameters, weights, pool, find, [batch], step=0.01)
        yield


WAYS: dict[str, Callable[[nn.Module, Tensor, argparse.Namespace], Iterator[None]]] = {
    "inference": inference,
    "passes": passes,
    "walk": walk,
}


def private_memory() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


if __name__ == "__main__":
    main()
