"""How far do blocks in turn get at equal numbers of local steps, against averaging? Prints a Markdown table.

    python benchmarks/block_convergence.py MODEL_FOLDER databricks-dolly-15k.jsonl [--study gap] [--seeds 3]

Four nodes, Dolly parted by a Dirichlet distribution over its categories (alpha 0.5), in memory. All runs take 800
local steps of 8 examples (128 tokens) in all, those of the study "long" four times as many: FedAvg over four nodes at
once, blocks one node after the other. Appends a line for each run to benchmarks/results/block_convergence.jsonl, makes
no run twice, and prints a Markdown table of the held-out loss (nats a token) after the last round.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from client_app.tasks import Node
from fedtune_strategies.language.partition import partition_file
from fedtune_strategies.protocol.records import from_record
from fedtune_strategies.testing import Handler, InMemoryGrid
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


def fedavg(lr: float, steps: int = 25, total: int = STEPS, **keys: object) -> dict:
    own = {"local_steps": steps, "lr": lr} | keys
    return {"method.name": "fedavg", "num-server-rounds": total // (steps * NODES)} | named("fedavg", own)


def blocks(lr: float, steps: int = 25, total: int = STEPS, **keys: object) -> dict:
    own = {"local_steps": steps, "lr": lr} | keys
    return {"method.name": "fedcybgd", "num-server-rounds": total // steps} | named("fedcybgd", own)


def late(weight: float, **keys: Any) -> dict:
    """Blocks of one layer, while one of the four nodes answers a round late."""
    fleet = {"strategy.late": weight, "strategy.min-nodes": NODES - 1, "round.deadline": 0.5}
    return blocks(3e-3, prefetch=False, **keys, **DOWN) | fleet


def named(section: str, keys: dict) -> dict:
    return {f"{section}.{key.replace('_', '-')}": value for key, value in keys.items()}


LONG = 4 * STEPS
APART: dict = {"final_norm": "own"}
COSINE: dict = {"lr_schedule": "cosine", "warmup": 0.05}
LINEAR: dict = {"lr_schedule": "linear", "warmup": 0.05}
BRISK: dict = LINEAR | {"beta1": 0.5}
DOWN: dict = BRISK | {"order": "descending"}
STUDIES: dict[str, dict[str, dict]] = {
    "lr": {
        "FedAvg, lr 0.0005": fedavg(5e-4),
        "FedAvg, lr 0.001": fedavg(1e-3),
        "FedAvg, lr 0.002": fedavg(2e-3),
        "FedAvg, lr 0.003": fedavg(3e-3),
        "FedAvg, lr 0.01": fedavg(1e-2),
        "norm apart, lr 0.003": blocks(3e-3, **APART),
        "norm apart, lr 0.01": blocks(1e-2, **APART),
        "norm apart, cosine, lr 0.003": blocks(3e-3, **COSINE, **APART),
        "norm apart, cosine, lr 0.006": blocks(6e-3, **COSINE, **APART),
        "cosine, lr 0.003": blocks(3e-3, **COSINE),
        "cosine, lr 0.004": blocks(4e-3, **COSINE),
    },
    "way": {
        "norm apart, cosine, 10 steps a turn": blocks(3e-3, 10, **COSINE, **APART),
        "norm apart, cosine, all layers in a block": blocks(3e-3, layers_per_block=5, **COSINE, **APART),
        "cosine, all layers in a block": blocks(3e-3, layers_per_block=5, **COSINE),
        "cosine, 50 steps a turn": blocks(3e-3, 50, **COSINE),
        "cosine, random": blocks(3e-3, order="random", **COSINE),
        "cosine, importance": blocks(3e-3, order="importance", **COSINE),
        "cosine, exact rest": blocks(3e-3, rest="none", **COSINE),
        "linear": blocks(3e-3, **LINEAR),
        "linear, beta1 0.5": blocks(3e-3, **BRISK),
    },
    "gap": {
        "FedAvg, lr 0.001": fedavg(1e-3),
        "FedAvg, lr 0.001, beta1 0.5": fedavg(1e-3, beta1=0.5),
        "a layer": blocks(3e-3, **DOWN),
        "two layers": blocks(3e-3, layers_per_block=2, **DOWN),
        "all layers": blocks(2e-3, layers_per_block=5, **DOWN),
    },
    "late": {
        "all in time": blocks(3e-3, prefetch=False, **DOWN),
        "late, refused": late(0.5),
        "late, rebased, weight 0.5": late(0.5, stale="rebase"),
        "late, rebased, weight 1": late(1.0, stale="rebase"),
        "late, averaged, weight 0.5": late(0.5, stale="average"),
        "late, averaged, weight 1": late(1.0, stale="average"),
    },
    "long": {
        "FedAvg, lr 0.001, four times as long": fedavg(1e-3, total=LONG),
        "a layer, four times as long": blocks(3e-3, total=LONG, **DOWN),
        "two layers, four times as long": blocks(3e-3, total=LONG, layers_per_block=2, **DOWN),
    },
}


class LateGrid(InMemoryGrid):
    """A federation in which one node is at work on its turns until the next round has begun, and silent meanwhile."""

    def __init__(self, nodes: Mapping[int, Handler], late: int) -> None:
        super().__init__(nodes)
        self._late, self._round = late, ""
        self._held: dict[str, Message] = {}

    def _answer(self, message: Message) -> str:
        round = message.metadata.group_id
        if round and round != self._round:
            self._round = round
            self._replies |= self._held
            self._held = {}
        key = super()._answer(message)
        if message.metadata.dst_node_id == self._late and (self._held or _is_change(self._replies[key])):
            self._held[key] = self._replies.pop(key)
        return key


def _is_change(reply: Message) -> bool:
    return from_record(reply.content)[0] == "block-reply"


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
        handlers = {i: node.handle for i, node in enumerate(nodes, start=1)}
        behind = NODES if "strategy.late" in settings else 0
        execute(LateGrid(handlers, behind), settings, run_id=1)
        return [record.body["eval/loss"] for record in Ledger.read(folder / "run").records("evaluation")]


if __name__ == "__main__":
    main()
