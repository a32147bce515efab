"""A two-sided zeroth-order step against two plain forward passes, and its memory against plain inference.

    python benchmarks/step.py [--model FOLDER] [--dtype float32] [--tokens 512] [--threads 2] [--no-memory]

Without a model it is a Llama of about 110 M parameters with random weights.
Steps and forward passes take turns. Memory is the
peak of a fresh process for each way, counted (on Linux) from when the model, the libraries and the compiled kernels are
loaded; the step may exceed inference by a twentieth and one layer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from math import nan
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fedtune_strategies.language.examples import IGNORE
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.zeroth_order import local_steps
from fedtune_strategies.zeroth_order.steps import Loss

STEPS = 5  # of one run: two passes over the weights each, and one more at the end
WAYS = {"in place": True, "layer by layer": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wider", type=int, default=16, help="K times this to a block of the walsh pool")
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    parser.add_argument("--memory", help="used by the script itself")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak(args))
        return
    memory = {way: nan if args.no_memory else float(child(way)) for way in ("plain", *WAYS)}
    times = measure(args)
    parameters = sum(p.numel() for p in model(args).parameters())
    print(
        f"{args.model or 'Llama'}, {parameters / 1e6:.0f} M parameters, {args.dtype}, 1 × {args.tokens} tokens,",
        end=" ",
    )
    layer = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in model(args).modules())
    print(f"largest layer {layer / 2**20:.0f} MB, {args.threads} threads, load of the machine {os.getloadavg()[0]:.1f}")
    print(
        "| way | seconds | spread | times two forward passes | in processor time | peak memory, MB | times inference |"
    )
    print("|---|---|---|---|---|---|---|")
    for way, values in times.items():
        clock, processor = zip(*values, strict=True)
        plain_clock, plain_processor = zip(*times["plain"], strict=True)
        row = [
            {"plain": "two forward passes"}.get(way, f"step, {way}"),
            f"{statistics.median(clock):.3f}",
            f"{min(clock):.3f} to {max(clock):.3f}",
            f"{statistics.median(clock) / statistics.median(plain_clock):.3f}",
            f"{statistics.median(processor) / statistics.median(plain_processor):.3f}",
            f"{memory[way]:.0f}",
            f"{memory[way] / memory['plain']:.3f}",
        ]
        print("| " + " | ".join(row) + " |")


def model(args: argparse.Namespace) -> torch.nn.Module:
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(getattr(torch, args.dtype)).eval()


def loss(tuned: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[:, : -(ids.shape[1] // 4)] = IGNORE  # the response is the last quarter
    return response_loss(tuned, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def run(way: str, tuned: torch.nn.Module, ids: torch.Tensor, steps: int, wider: int, loss: Loss) -> None:
    if way == "plain":
        with torch.no_grad():
            for _ in range(2 * steps):
                float(loss(tuned, ids))
    else:
        pool = make_pool("walsh", 1, 4096, 4096 * wider)
        local_steps(tuned, pool, loss, [ids] * steps, range(steps), eps=1e-4, lr=1e-7, in_place=WAYS[way])


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds of one step by the clock and of the processor, from short runs."""
    tuned, ids = model(args), torch.arange(args.tokens)[None]
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ("plain", *WAYS)}
    for turn in range(args.repeats + 1):
        for way, values in times.items():
            started = time.perf_counter(), time.process_time()
            run(way, tuned, ids, STEPS, args.wider, loss)
            if turn:
                values.append(((time.perf_counter() - started[0]) / STEPS, (time.process_time() - started[1]) / STEPS))
    return times


def peak(args: argparse.Namespace) -> float:
    """MB resident at most while the model runs, weights and libraries included."""
    tuned, ids = model(args), torch.arange(args.tokens)[None]
    small = torch.nn.Linear(4, 4).to(getattr(torch, args.dtype))
    for way in WAYS:  # load the compiled kernels, whatever way is measured
        run(way, small, torch.zeros(1, 4), 1, args.wider, lambda m, x: m(x.to(m.weight.dtype)).float().mean())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run(args.memory, tuned, ids, 2, args.wider, loss)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def child(way: str) -> str:
    command = [sys.executable, *sys.argv, "--memory", way]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
