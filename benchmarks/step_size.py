"""Which step suits the seed-space gradient? Held-out loss for some relative steps and sizes K, in memory.

    python benchmarks/step_size.py tiny|stories|FOLDER [--seeds 1024 16384] [--steps 0.005 0.01 0.02] [--rounds 4]

"tiny" is the embedded model on its own tasks, "stories" the model of 260 thousand parameters on Dolly, and FOLDER any
model on Dolly, on two nodes of unlike categories. Replies and moves are coded as on the wire: one bit up, four down.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from comparison.protocols import STORIES, dolly, tiny

from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.evaluation import evaluate_loss
from fedtune_strategies.language.examples import Examples, batches, tokenise
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import LanguageModel, load_model
from fedtune_strategies.seed_gradient import decode, default_step, encode, local_walk, slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.seed_space.moved import MovedWeights
from fedtune_strategies.seed_space.scaled import rms_scales, scaled
from fedtune_strategies.shared_random import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[16384])
    parser.add_argument("--steps", type=float, nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--beta1", type=float, default=0.5)
    parser.add_argument("--local-steps", type=int, default=0)
    parser.add_argument("--run-seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    name = {"tiny": "fedtune-tiny", "stories": str(STORIES)}.get(args.model, args.model)
    model = load_model(name)
    with tempfile.TemporaryDirectory() as folder:
        big = name == args.model
        files = tiny(Path(folder)) if args.model == "tiny" else dolly(Path(folder), 0.5, 2 if big else 10)
        length, rows, steps = (64, 4, 24) if args.model == "tiny" else (96, 2, 8 if big else 20)
        nodes = [tokenise(read_rows(file), model.tokenizer, length) for file in files.nodes]
        held_out = tokenise(read_rows(files.test), model.tokenizer, length)
    held_out = Examples(held_out.tokens[:64], held_out.prompt_lengths[:64], held_out.references[:64], held_out.pad_id)
    steps = args.local_steps or steps
    count = sum(parameter.numel() for parameter in tuned_parameters(model.model).values())
    print(f"{name}: {count} parameters, start {evaluate_loss(model.model, held_out).loss:.3f}", flush=True)
    base = dict(base_tensors(model))
    for seeds in args.seeds:
        for step in args.steps or [default_step(count, seeds) * factor for factor in (0.5, 1, 2)]:
            for seed in args.run_seeds:
                start = time.process_time()
                found = run(model, base, nodes, held_out, seeds, step, args.rounds, steps, rows, seed, args.beta1)
                print(f"K {seeds} step {step:.5f} seed {seed}:", *(f"{loss:.3f}" for loss in found),
                      f"({time.process_time() - start:.0f} s)", flush=True)  # fmt: skip


def run(
    language: LanguageModel, base: dict[str, torch.Tensor], nodes: list[Examples], held_out: Examples, seeds: int,
    step: float, rounds: int, steps: int, rows: int, seed: int, beta1: float,
) -> list[float]:  # fmt: skip
    """Tune for some rounds; returns the held-out loss after each."""
    model, parameters, scales = language.model, tuned_parameters(language.model), rms_scales(base)
    weights, losses = MovedWeights(base), []
    for number in range(1, rounds + 1):
        pool = scaled(make_pool("walsh", seed * 1000 + number, seeds), scales)
        find, replies = partial(slopes, model, parameters, response_loss, pool=pool), []
        for node in sample((seed, number), [str(i) for i in range(len(nodes))], min(4, len(nodes))):
            found = local_walk(
                partial(pool.rebuild_model, parameters, weights), pool, find,
                batches(nodes[int(node)], rows, steps, (seed, number, node)), step=step, beta1=beta1,
            )  # fmt: skip
            packed, unit = encode(found.theta.numpy(), 1)
            replies.append((len(nodes[int(node)]), decode(packed, unit, 1, seeds)))
        mean = sum(count * theta for count, theta in replies) / sum(count for count, _ in replies)
        packed, unit = encode(np.asarray(mean, np.float32), 4)
        weights.add(pool, torch.from_numpy(decode(packed, unit, 4, seeds)))
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])
        losses.append(evaluate_loss(model, held_out).loss)
    for name, parameter in parameters.items():
        parameter.data.copy_(base[name])
    return losses


if __name__ == "__main__":
    main()
