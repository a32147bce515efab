"""What does a step of the seed-space gradient cost? Prints a Markdown table.

    python benchmarks/seed_gradient.py [--layers 12] [--hidden 768] [--vocabulary 32000] [--batch 2] [--length 128]

A random Llama (109.5 M parameters by default) with tied embeddings, read from a file. Every figure is from its own
process. Memory is the largest private memory (what the system cannot take back from files) less what the process had
before the model: of one loss without gradient, and of a step, whose W_r is in a mapped file. Seconds are processor
time, the median of the steps after the first: of a checkpointed forward and backward pass of the plain model, and of a
step. Where the weights are not in memory, each layer's are made when it runs: from the mapped file, or from codes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedtune_strategies.blocks.layers import checkpointed
from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.coded import Only
from fedtune_strategies.language.examples import Batch
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import LanguageModel, load_model
from fedtune_strategies.language.model_files import model_folder
from fedtune_strategies.memory import prefer_memory
from fedtune_strategies.seed_gradient import local_walk, slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.seed_space.moved import AtPoint, MovedWeights
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
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure(args, *args.child)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "small", config_of(hidden=64, layers=1, heads=4, vocabulary=2048))
        write_model(folder / "model", config_of(args.hidden, args.layers, heads=12, vocabulary=args.vocabulary))
        print("| weights | held | memory, MB | of inference | s | of passes |\n|---|---|---|---|---|---|")
        for dtype in args.dtypes:
            plain, passes = (in_child(way, dtype, "exact", name) for way in ("inference", "passes"))
            print(f"| {dtype} | inference | {plain['memory'] / 1e6:.0f} | 1 | {plain['seconds']:.2f} | |")
            print(f"| {dtype} | passes | {passes['memory'] / 1e6:.0f} | | {passes['seconds']:.2f} | 1 |")
            for held, way, base in HELD:
                step = in_child(way, dtype, base, name)
                print(
                    f"| {dtype} | step, {held} | {step['memory'] / 1e6:.0f} | {step['memory'] / plain['memory']:.2f} "
                    f"| {step['seconds']:.2f} | {step['seconds'] / passes['seconds']:.2f} |",
                    flush=True,
                )


def config_of(hidden: int, layers: int, heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
    )


def write_model(folder: Path, config: LlamaConfig) -> None:
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("fedtune-tiny")).save_pretrained(folder)


def in_child(way: str, dtype: str, base: str, folder: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--child", way, dtype, base, folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(args: argparse.Namespace, way: str, dtype: str, base: str, folder: str) -> dict[str, float]:
    prefer_memory()
    load = partial(load_model, dtype=dtype, base=base, empty=way == "by_layers")
    run(way, args, load(f"{folder}/small"))  # compiles the kernels
    before, readings, done = private_memory(), [0], threading.Event()
    language = load(f"{folder}/model")

    def watch() -> None:
        while not done.wait(INTERVAL):
            readings[0] = max(readings[0], private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        seconds = run(way, args, language)
    finally:  # or the process would never end
        done.set()
        watcher.join()
    return {"memory": readings[0] - before, "seconds": statistics.median(seconds[1:])}


def run(way: str, args: argparse.Namespace, language: LanguageModel) -> list[float]:
    """Take some steps; returns the seconds of each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, language.model.config.vocab_size, (args.batch, args.length), generator=generator)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    starts = [time.process_time()]
    for _ in WAYS[way](language, batch, args):
        starts.append(time.process_time())
    return [later - earlier for earlier, later in itertools.pairwise(starts)]


def inference(language: LanguageModel, batch: Batch, args: argparse.Namespace) -> Iterator[None]:
    with torch.no_grad():
        for _ in range(args.steps + 1):
            response_loss(language.model, batch)
            yield


def passes(language: LanguageModel, batch: Batch, args: argparse.Namespace) -> Iterator[None]:
    with checkpointed(language.model, first=0):
        for _ in range(args.steps + 1):
            response_loss(language.model, batch).backward()
            language.model.zero_grad()
            yield


def in_memory(language: LanguageModel, batch: Batch, args: argparse.Namespace) -> Iterator[None]:
    parameters, base = tuned_parameters(language.model), base_tensors(language)
    pool = scaled(make_pool("walsh", 0, args.seeds), rms_scales(base))
    weights = MovedWeights(base)
    weights.add(pool, torch.zeros(args.seeds))
    find = partial(slopes, language.model, parameters, response_loss, pool=pool)
    for _ in range(args.steps + 1):
        local_walk(partial(pool.rebuild_model, parameters, weights), pool, find, [batch], step=0.01)
        yield


def by_layers(language: LanguageModel, batch: Batch, args: argparse.Namespace) -> Iterator[None]:
    """As in a first round: W_r is W_0, made from its codes or from the file."""
    parameters, base = tuned_parameters(language.model), base_tensors(language)
    pool = scaled(make_pool("walsh", 0, args.seeds), rms_scales(base))
    weights = AtPoint(pool, Only(base, parameters), base)
    find = partial(slopes, language.model, parameters, response_loss, pool=pool, weights=weights)

    def place(theta: Tensor) -> None:
        weights.theta = theta

    for _ in range(args.steps + 1):
        local_walk(place, pool, find, [batch], step=0.01)
        yield


WAYS: dict[str, Callable[[LanguageModel, Batch, argparse.Namespace], Iterator[None]]] = {
    "inference": inference,
    "passes": passes,
    "in_memory": in_memory,
    "by_layers": by_layers,
}
HELD = (
    ("in memory", "in_memory", "exact"),
    ("from the file", "by_layers", "exact"),
    ("as int8", "by_layers", "int8"),
    ("as nf4", "by_layers", "nf4"),
)


def private_memory() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


if __name__ == "__main__":
    main()
