"""What rounding on the wire and faulty nodes do to FedKSeed's held-out loss, in memory on the embedded model.

    python benchmarks/fedkseed_options.py wire|attacks [--nodes 10] [--rounds 8] [--steps 40] [--repeats 2]

Prints a Markdown table: held-out loss after the last round for each run seed, and bytes of payload per node and round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from client_app.tasks import Node
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import Handler, InMemoryGrid
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger
from server_app.run import execute

SETTINGS = {
    "train.seq-length": 128,
    "train.batch-size": 4,
    "fedkseed.seeds": 1024,
    "fedkseed.lr": 3e-4,
    "eval.answers": 0,
    "eval.max-examples": 256,
}
WIRE = {
    "24-bit moves, float32 scalars": {"fedkseed.theta-bits": 24},
    "8-bit moves, float32 scalars (default)": {},
    "4-bit moves, float32 scalars": {"fedkseed.theta-bits": 4},
    "8-bit moves, float16 scalars": {"fedkseed.scalar-bits": 16},
    "8-bit moves, int8 scalars": {"fedkseed.scalar-bits": 8},
}
UNGUARDED = {"fedkseed.clip": 0.0, "fedkseed.outlier": 0.0}
DEFENCES = {"none": UNGUARDED, "default": {}, "fedmedian": {"strategy.aggregation": "fedmedian"}}
ATTACKS: dict[str, Callable[[torch.Tensor, np.random.Generator], torch.Tensor]] = {
    "no attack": lambda scalars, random: scalars,
    "random": lambda scalars, random: torch.from_numpy(random.normal(size=len(scalars)).astype(np.float32) * 5),
    "huge": lambda scalars, random: scalars * 1e6,
    "sign-flipped": lambda scalars, random: -scalars,
    "not finite": lambda scalars, random: torch.where(torch.arange(len(scalars)) % 2 == 0, torch.nan, torch.inf),
}


def faulty(node: Node, attack: str) -> Handler:
    """Make a node that sends something else than its scalars."""
    random = np.random.default_rng(0)

    def handle(kind: str, payload: bytes) -> tuple[str, bytes]:
        kind, payload = node.handle(kind, payload)
        message = protocol.decode(kind, payload)
        if isinstance(message, protocol.SeedReply):
            message = replace(message, scalars=ATTACKS[attack](message.scalars, random))
        return message.kind, protocol.encode(message)

    return handle


def measure(settings: dict, files: list[Path], attack: str) -> tuple[float, float, float]:
    """Run once; returns loss before, loss after and mean payload bytes of a returning node's round."""
    with tempfile.TemporaryDirectory() as folder:
        flat = settings | {"run.dir": folder}
        nodes = [Node(flat, {"name": f"node-{i}", "data": str(file)}, i) for i, file in enumerate(files)]
        handlers = {i: node.handle for i, node in enumerate(nodes)}
        handlers[0] = faulty(nodes[0], attack)
        execute(InMemoryGrid(handlers), flat, run_id=1)
        ledger = Ledger.read(Path(folder))
        losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
        later = [r.body["bytes_down"] + r.body["bytes_up"] for r in ledger.records("reply") if r.round > 1]
        return losses[0], losses[-1], statistics.mean(later)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("wire", "attacks"))
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.what == "wire":
        variants = {(name,): (changes, "no attack") for name, changes in WIRE.items()}
    else:
        variants = {(a, d): (changes, a) for a in ATTACKS for d, changes in DEFENCES.items()}
    heads = ["wire"] if args.what == "wire" else ["one node sends", "defence"]
    print("| " + " | ".join([*heads, "loss before", "loss after, by seed", "bytes per node and round"]) + " |")
    print("|" + "---|" * (len(heads) + 3))
    with tempfile.TemporaryDirectory() as name:
        files, held_out = write_federation(Path(name), args.nodes, train_per_task=64)
        for labels, (changes, attack) in variants.items():
            rows = []
            for seed in range(args.repeats):
                flat = SETTINGS | {
                    "num-server-rounds": args.rounds,
                    "fedkseed.local-steps": args.steps,
                    "eval.every": args.rounds,
                    "eval.data": str(held_out),
                    "train.seed": seed,
                }
                rows.append(measure(flat | changes, files, attack))
            after = ", ".join(f"{row[1]:.4f}" for row in rows)
            cells = [*labels, f"{rows[0][0]:.4f}", after, f"{statistics.mean(row[2] for row in rows):,.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
