"""Soak: several hundred rounds in one process while nodes come and go, to see whether anything grows.

    python benchmarks/soak.py --rounds 400

Real nodes (model, data, tasks) and the real server over an in-memory grid; at every look of the server a node may
leave, come back under its own or a new id of Flower, lose its worker, fail or answer nothing. Sampled: resident
memory, open files and sockets, threads, child processes, the ledger's size. Prints a row per sample, and the growth
from the first quarter's end to the last sample.
"""

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from flwr.app import Message
from node import write_model

from client_app.node import Node
from fedtune_strategies.testing import Handler, InMemoryGrid
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger
from server_app.run import execute

NODES = 5
SMALL = {
    "train.seq-length": 32,
    "train.batch-size": 1,
    "fedkseed.seeds": 64,
    "train.local-steps": 2,
    "strategy.min-nodes": 1,
    "round.deadline": 0.5,
    "round.node-wait": 60.0,
    "round.attempts": 20,
}


class Churn(InMemoryGrid):
    """Nodes come and go; samples what the process uses."""

    def __init__(self, settings: dict[str, Any], files: list[Path], every: int, folder: Path) -> None:
        self.rng, self.process, self.every, self.folder = random.Random(0), psutil.Process(), every, folder
        self.workers = [Node(settings, {"name": f"node-{i}", "data": str(file)}, i) for i, file in enumerate(files)]
        self.make = lambda i: Node(settings, {"name": f"node-{i}", "data": str(files[i])}, i)
        self.away: dict[int, int] = {}
        self.events: dict[str, int] = {}
        self.samples: list[dict[str, float]] = []
        self.fresh, self.looks = 100, 0
        # Which node answers under an id of Flower's: a node that comes back may have another one.
        self.number = {i + 1: i for i in range(len(files))}
        self.present = {i + 1: self.handler(i) for i in range(len(files))}
        super().__init__(self.present)

    def handler(self, i: int) -> Handler:
        """Make what answers for a node: now and then it fails."""

        def handle(kind: str, payload: bytes) -> tuple[str, bytes]:
            if kind != "hello" and self.rng.random() < 0.05:
                self.count("failed")
                raise RuntimeError("power cut")
            return self.workers[i].handle(kind, payload)

        return handle

    def count(self, event: str) -> None:
        """Count what happened."""
        self.events[event] = self.events.get(event, 0) + 1

    def get_node_ids(self) -> list[int]:
        """Let somebody leave or come back."""
        self.looks += 1
        for i, due in list(self.away.items()):
            if due <= self.looks:
                del self.away[i]
                self.fresh += self.rng.random() < 0.5
                node_id = self.fresh * 100 + i if self.rng.random() < 0.5 else i + 1
                self.present[node_id], self.number[node_id] = self.handler(i), i
                self.count("came back")
        if len(self.present) > 1 and self.rng.random() < 0.3:
            gone = self.rng.choice(list(self.present))
            del self.present[gone]
            self.away[self.number[gone]] = self.looks + self.rng.randint(1, 6)
            self.count("left")
        if self.rng.random() < 0.02:
            i = self.rng.randrange(len(self.workers))
            self.workers[i] = self.make(i)
            self.count("lost its worker")
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sample now and then."""
        asked = list(messages)
        rounds = [int(m.metadata.group_id) for m in asked if m.metadata.group_id.isdigit()]
        if rounds and rounds[0] % self.every == 0 and (not self.samples or self.samples[-1]["round"] < rounds[0]):
            self.samples.append(self.sample(rounds[0]))
            print(json.dumps(self.samples[-1]), flush=True)
        return super().push_messages(asked)

    def sample(self, round: int) -> dict[str, float]:
        """Say what the process uses now."""
        return {
            "round": round,
            "memory_mb": rounded(self.process.memory_info().rss / 1e6),
            "files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "processes": len(self.process.children(recursive=True)),
            "sockets": len(self.process.net_connections()),
            "kept_replies": len(self._replies),
            "ledger_kb": (self.folder / "ledger.sqlite").stat().st_size // 1000,
        }


def rounded(value: float) -> float:
    return round(value, 1)


def soak(method: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Run one soak; returns what grew and what happened."""
    files, _ = write_federation(folder / "data", NODES, train_per_task=8, heldout_per_task=2)
    run = folder / method
    # A few thousand parameters: what may grow does not depend on the model's size.
    model = str(write_model(folder / "model", layers=2, width=16))
    settings = SMALL | {"model.name": model, "method.name": method, "num-server-rounds": rounds, "run.dir": str(run)}
    grid = Churn(settings, files, max(1, rounds // 20), run)
    start = psutil.Process().cpu_times()
    execute(grid, settings, run_id=1)
    end = psutil.Process().cpu_times()
    ledger = Ledger.read(run)
    final = ledger.last("round")
    assert final is not None and final.round == rounds and ledger.damage() is None
    kinds: dict[str, int] = {}
    for record in ledger.records():
        kinds[record.kind] = kinds.get(record.kind, 0) + 1
    ledger.close()
    quarter, last = grid.samples[len(grid.samples) // 4], grid.samples[-1]
    return {
        "method": method,
        "rounds": rounds,
        "cpu_seconds": round(end.user + end.system - start.user - start.system),
        "growth": {key: rounded(last[key] - quarter[key]) for key in last if key != "round"},
        "events": grid.events,
        "records": kinds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--methods", default="fedkseed,fedcybgd")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name in options.methods.split(","):
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "data").mkdir()
            print(json.dumps(soak(name, options.rounds, Path(place))), flush=True)
