"""How far do blocks in turn get at equal numbers of local steps, against averaging? Prints a Markdown table.

    python benchmarks/block_convergence.py MODEL_FOLDER databricks-dolly-15k.jsonl [--study lr|way]

Four nodes, Dolly parted by a Dirichlet distribution over its categories (alpha 0.5), in memory. All runs take 800
local steps of 8 examples (128 tokens) in all: FedAvg over four nodes at once, blocks one node after the other. "FedAvg,
as long" takes 800 steps on every node: as many one after the other as the blocks, four times as many in all. Appends
a line for each run to benchmarks/results/block_convergence.jsonl, makes no run twice, and prints a Markdown table of
the held-out loss (nats a token) after the last round.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from pathlib import Path

import torch

from client_app.tasks import Node
from fedtune_strategies.language.partition import partition_file
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute

RESULTS = Path(__file__).parent / "results" / "block_convergence.jsonl"
STEPS, NODES, HELD_OUT = 800, 4, 256
SETTINGS = {
    "train.seq-length": 128,
    "train.batch-size": 8,
    "strategy.min-nodes": NODES,
    "eval.answers": 16,
    "eval.max-new-tokens": 1,
    "eval.max-examples": HELD_OUT,
    "eval.every": 1000,
}


def fedavg(lr: float, steps: int = 25, total: int = STEPS) -> dict:
    return {
        "method.name": "fedavg",
        "num-server-rounds": total // (steps * NODES),
        "fedavg.local-steps": steps,
        "fedavg.lr": lr,
    }


def blocks(lr: float, steps: int = 25, **keys: object) -> dict:
    rounds = STEPS // (steps * int(str(keys.get("nodes_per_round", 1))))
    own = {"local_steps": steps, "lr": lr} | keys
    named = {f"fedcybgd.{key.replace('_', '-')}": value for key, value in own.items()}
    return {"method.name": "fedcybgd", "num-server-rounds": rounds} | named


STUDIES: dict[str, dict[str, dict]] = {
    "lr": {
        "FedAvg, lr 0.003": fedavg(3e-3),
        "blocks, lr 0.01": blocks(1e-2),
        "FedAvg, lr 0.01": fedavg(1e-2),
        "blocks, lr 0.003": blocks(3e-3),
        "blocks, lr 0.001": blocks(1e-3),
        "FedAvg, lr 0.001": fedavg(1e-3),
    },
    "way": {
        "blocks, 10 steps a turn": blocks(3e-3, 10),
        "blocks, 50 steps a turn": blocks(3e-3, 50),
        "blocks, descending": blocks(3e-3, order="descending"),
        "blocks, random": blocks(3e-3, order="random"),
        "blocks, importance": blocks(3e-3, order="importance"),
        "blocks, cosine": blocks(3e-3, lr_schedule="cosine", warmup=0.05),
        "blocks, cosine, lr 0.006": blocks(6e-3, lr_schedule="cosine", warmup=0.05),
        "blocks, cosine, 10 steps a turn": blocks(3e-3, 10, lr_schedule="cosine", warmup=0.05),
        "blocks, cosine, five layers a block": blocks(3e-3, layers_per_block=5, lr_schedule="cosine", warmup=0.05),
        "blocks, cosine, layers alone": blocks(3e-3, train_embeddings=False, lr_schedule="cosine", warmup=0.05),
        "blocks, exact rest": blocks(3e-3, rest="none"),
        "blocks, nf4 rest": blocks(3e-3, rest="nf4"),
        "blocks, int8 up": blocks(3e-3, upload="int8"),
        "blocks, two in parallel": blocks(3e-3, structure="parallel", nodes_per_round=2),
        "blocks, two averaged": blocks(3e-3, structure="averaged", nodes_per_round=2),
        "FedAvg, lr 0.003, as long": fedavg(3e-3, total=STEPS * NODES),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--study", choices=STUDIES, default="lr")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    print("| variant | " + " | ".join(f"seed {seed}" for seed in range(args.seeds)) + " |")
    print("|---" * (args.seeds + 1) + "|")
    for name, settings in STUDIES[args.study].items():
        if args.only in name:
            losses = [result(args.model, args.data, name, settings, seed) for seed in range(args.seeds)]
            print(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)


def result(model: str, data: str, name: str, settings: dict, seed: int) -> float:
    key = {"variant": name, "seed": seed, "settings": settings}
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    for found in map(json.loads, lines):
        if {part: found[part] for part in key} == key:
            return found["loss"]
    start = time.process_time()
    losses = run(model, data, SETTINGS | settings | {"model.name": model, "train.seed": seed})
    line = key | {"start": losses[0], "loss": losses[-1], "cpu_seconds": round(time.process_time() - start)}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return losses[-1]


def run(model: str, data: str, settings: dict) -> list[float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = Path(data).read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(rows)
        (folder / "held_out.jsonl").write_text("\n".join(rows[:HELD_OUT]) + "\n", encoding="utf-8")
        (folder / "train.jsonl").write_text("\n".join(rows[HELD_OUT:]) + "\n", encoding="utf-8")
        files = partition_file(folder / "train.jsonl", folder / "nodes", "category", NODES, alpha=0.5)
        settings = settings | {"eval.data": str(folder / "held_out.jsonl"), "run.dir": str(folder / "run")}
        nodes = [Node(settings, {"name": f"node-{i}", "data": str(path)}, i) for i, path in enumerate(files, start=1)]
        execute(InMemoryGrid({i: node.handle for i, node in enumerate(nodes, start=1)}), settings, run_id=1)
        return [record.body["eval/loss"] for record in Ledger.read(folder / "run").records("evaluation")]


if __name__ == "__main__":
    main()
