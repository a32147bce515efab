"""How many of another node's scalars can a member of FedKSeed read from the change of theta? Prints a table.

    python benchmarks/members.py [--nodes 2 3 5] [--steps 200]

A whole round in one process: the embedded model, rule-made tasks of which each node has its own. The attacker is node
0. It knows the run's configuration, all names, its own draws and scalars, the step size, everybody's share, and theta
after the round, which its next task brings; it takes out its own part. It wants node 1's scalars.

*public*: the nodes' ``draw-key`` is "public", so everybody can compute who drew which seed. Shown is how many of the
scalars are read with an error of less than 5 %, and how well all those guesses correlate with the truth.

*secret*: each node has its own key, as by default. The attacker sees all scalars and not whose they are. Shown is how
often it names the right node for a scalar when it goes by size, over the seeds that one other node alone has drawn, and
in brackets how often by chance. It is even told how large each node's scalars are.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from client_app.node import Node
from fedtune_strategies.fedkseed.config import FedKSeedRunConfig
from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.packing import read_scalars
from fedtune_strategies.fedkseed.seed_draws import draw_seeds, seed_key
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import parse
from fedtune_strategies.testing import InMemoryGrid
from fedtune_strategies.tiny.tasks import node_rows
from server_app.ledger import Ledger
from server_app.run import execute

UNIFORM = np.empty(0, dtype=np.int16)


class Round:
    """One round of a federation: what all members know of it, and what each node did."""

    def __init__(self, folder: Path, nodes: int, steps: int, public: bool) -> None:
        settings = {
            "model.name": "fedtune-tiny", "run.dir": str(folder / "run"), "num-server-rounds": 1,
            "strategy.min-nodes": nodes, "train.local-steps": steps, "train.lr": 1e-4, "strategy.weighting": "uniform",
        }  # fmt: skip
        self.config = cast(FedKSeedRunConfig, parse(settings))
        workers = {}
        for number in range(nodes):
            data = folder / f"{number}.jsonl"
            rows = node_rows(number, nodes, train_per_task=64, seed=0)
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            key = "public" if public else f"key of {number}"
            own = {"name": f"node-{number}", "data": str(data), "draw-key": key}
            workers[number + 1] = Node(settings, own, 1).handle
        execute(InMemoryGrid(workers), settings, run_id=1)
        ledger = Ledger.read(folder / "run")
        (round,) = ledger.records("round")
        self.theta = safetensors.torch.load(ledger.payload(round))["theta"].numpy().astype(np.float64)
        replies = [protocol.decode("seed-reply", ledger.payload(record)) for record in ledger.records("reply")]
        self.replies: list[SeedReply] = sorted(replies, key=lambda one: one.node)  # type: ignore[arg-type,attr-defined]

    def draws(self, number: int, *, known: bool) -> NDArray[np.int64]:
        """Return the seeds that a node drew; where its key is not known, what others would take them for."""
        secret = self.replies[number].key if known else ""
        key = seed_key(self.config, 1, f"node-{number}", secret)
        return draw_seeds(key, self.config.train.local_steps, self.config.fedkseed.seeds, UNIFORM)

    def part(self, number: int) -> NDArray[np.float64]:
        """Return a node's own part of the sum over all scalars, by seed."""
        part = np.zeros(self.config.fedkseed.seeds)
        np.add.at(part, self.draws(number, known=True), self.scalars(number))
        return part

    def scalars(self, number: int) -> NDArray[np.float64]:
        """Return a node's scalars."""
        reply = self.replies[number]
        return np.nan_to_num(read_scalars(reply.scalars, reply.unit).astype(np.float64))

    def seen(self) -> NDArray[np.float64]:
        """Return what node 0 sees: the sum of the others' scalars on each seed."""
        return -self.theta / self.config.train.lr * len(self.replies) - self.part(0)


def read(round: Round) -> str:
    """Read node 1's scalars by the draws that a public key gives."""
    truth, guess = round.scalars(1), round.seen()[round.draws(1, known=False)]
    right = int((np.abs(guess - truth) < 0.05 * np.abs(truth)).sum())
    correlation = np.corrcoef(guess, truth)[0, 1] if guess.any() else 0.0
    return f"{right} of {len(truth)} ({correlation:.2f})"


def attributed(round: Round) -> str:
    """Name the node of each scalar, by size alone."""
    others = range(1, len(round.replies))
    parts = np.array([round.part(number) for number in others])
    alone = (parts != 0).sum(axis=0) == 1
    size = np.abs(round.seen()[alone])
    spread = np.array([round.scalars(number).std() for number in others])
    likelihood = -0.5 * (size / spread[:, None]) ** 2 - np.log(spread)[:, None]
    right = likelihood.argmax(axis=0) == (parts != 0)[:, alone].argmax(axis=0)
    return f"{right.mean():.0%} ({1 / len(parts):.0%})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print("| nodes | public: read | secret: read | secret: named by size |\n| ---: | ---: | ---: | ---: |", flush=True)
    for nodes in args.nodes:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            public, secret = (Round(Path(folder), nodes, args.steps, folder == one) for folder in (one, other))
        print(f"| {nodes} | {read(public)} | {read(secret)} | {attributed(secret)} |", flush=True)


if __name__ == "__main__":
    main()
