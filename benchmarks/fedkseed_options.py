"""What FedKSeed's options do to the held-out loss, in memory on the embedded model.

    python benchmarks/fedkseed_options.py wire|attacks|pools|auto|pro [--nodes 10] [--rounds 6] [--steps 20] [--seeds 2]

Each run seed has directions, draws and batches of its own. Appends a line for each run to
benchmarks/results/fedkseed_options.jsonl, makes no run twice, and prints a Markdown table: held-out loss (nats a token)
after the last round for each run seed, and bytes of payload per node and round.
"""

from __future__ import annotations

import argparse
import json
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

RESULTS = Path(__file__).parent / "results" / "fedkseed_options.jsonl"
SETTINGS = {
    "train.seq-length": 64,
    "train.batch-size": 4,
    "fedkseed.seeds": 1024,
    "fedkseed.lr": 4e-4,
    "eval.answers": 0,
    "eval.max-examples": 256,
}
ATTACKS: dict[str, Callable[[torch.Tensor, np.random.Generator], torch.Tensor]] = {
    "its scalars": lambda scalars, random: scalars,
    "random scalars": lambda scalars, random: torch.from_numpy(random.normal(size=len(scalars)).astype(np.float32) * 5),
    "huge scalars": lambda scalars, random: scalars * 1e6,
    "wrong signs": lambda scalars, random: -scalars,
    "not finite": lambda scalars, random: torch.where(torch.arange(len(scalars)) % 2 == 0, torch.nan, torch.inf),
}
UNGUARDED = {"fedkseed.clip": 0.0, "fedkseed.outlier": 0.0}
MEDIAN = {"strategy.aggregation": "fedmedian"}
# Variant: settings that differ. In "attacks" the variant's first part is what one node sends.
STUDIES: dict[str, dict[str, dict]] = {
    "wire": {
        "24-bit moves, float32 scalars": {"fedkseed.theta-bits": 24},
        "8-bit moves, float32 scalars (default)": {},
        "4-bit moves, float32 scalars": {"fedkseed.theta-bits": 4},
        "8-bit moves, float16 scalars": {"fedkseed.scalar-bits": 16},
        "8-bit moves, int8 scalars": {"fedkseed.scalar-bits": 8},
    },
    "attacks": {
        "its scalars, default": {},
        "its scalars, fedmedian": MEDIAN,
        "random scalars, no defence": UNGUARDED,
        "random scalars, default": {},
        "huge scalars, no defence": UNGUARDED,
        "huge scalars, default": {},
        "wrong signs, default": {},
        "wrong signs, fedmedian": MEDIAN,
        "not finite, default": {},
    },
    "pools": {
        "K = 128, one pool": {"fedkseed.seeds": 128},
        "K = 128, a fresh pool every 2 rounds": {"fedkseed.seeds": 128, "fedkseed.pool-every": 2},
        "K = 1024, one pool": {},
    },
    "auto": {
        "by hand (4e-4, 1e-3)": {},
        "auto": {"fedkseed.lr": "auto", "fedkseed.eps": "auto"},
    },
    "pro": {
        "K = 32, uniform": {"fedkseed.seeds": 32},
        "K = 32, Pro counted": {"fedkseed.seeds": 32, "method.name": "fedkseed-pro"},
        "K = 32, Pro counted, T = 0.3": {
            "fedkseed.seeds": 32,
            "method.name": "fedkseed-pro",
            "fedkseed.pro-temperature": 0.3,
        },
    },
}


def faulty(node: Node, attack: str) -> Handler:
    """Make a node that sends something else than its scalars."""
    random = np.random.default_rng(0)

    def handle(kind: str, payload: bytes) -> tuple[str, bytes]:
        message = protocol.decode(*node.handle(kind, payload))
        if isinstance(message, protocol.SeedReply):
            message = replace(message, scalars=ATTACKS[attack](message.scalars, random))
        return message.kind, protocol.encode(message)

    return handle


def measure(settings: dict, files: list[Path], attack: str) -> dict[str, float]:
    """Run once; returns loss before and after, and mean payload bytes of a node's round after the first."""
    with tempfile.TemporaryDirectory() as folder:
        flat = settings | {"run.dir": folder}
        nodes = [Node(flat, {"name": f"node-{i}", "data": str(file)}, i) for i, file in enumerate(files)]
        handlers: dict[int, Handler] = {i: node.handle for i, node in enumerate(nodes)}
        handlers[0] = faulty(nodes[0], attack)
        execute(InMemoryGrid(handlers), flat, run_id=1)
        ledger = Ledger.read(Path(folder))
        losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
        later = [r.body["bytes_down"] + r.body["bytes_up"] for r in ledger.records("reply") if r.round > 1]
        return {"before": losses[0], "after": losses[-1], "bytes": statistics.mean(later)}


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    size = {"nodes": args.nodes, "rounds": args.rounds, "steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        files, held_out = write_federation(Path(name), args.nodes, train_per_task=64)
        common = SETTINGS | {
            "num-server-rounds": args.rounds,
            "fedkseed.local-steps": args.steps,
            "eval.every": args.rounds,
            "eval.data": str(held_out),
        }
        for seed in range(args.seeds):
            for variant, changes in STUDIES[args.study].items():
                key = {"study": args.study, "variant": variant, "seed": seed, **size}
                if key in [{part: row[part] for part in key} for row in rows()]:
                    continue
                attack = variant.split(",")[0] if args.study == "attacks" else "its scalars"
                found = measure(common | {"train.seed": seed} | changes, files, attack)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(key | found) + "\n")
    table(args.study, size)


def rows() -> list[dict]:
    """Read what was measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(study: str, size: dict[str, int]) -> None:
    """Print a study's losses."""
    print(f"| {study} | loss before | loss after, by run seed | mean | bytes |\n|---|---|---|---|---|")
    for variant in STUDIES[study]:
        found = [
            row for row in rows() if row["study"] == study and row["variant"] == variant and size.items() <= row.items()
        ]
        after = [row["after"] for row in sorted(found, key=lambda row: row["seed"])]
        cells = [variant, f"{found[0]['before']:.3f}", ", ".join(f"{loss:.3f}" for loss in after)]
        sent = statistics.mean(row["bytes"] for row in found)
        print("| " + " | ".join([*cells, f"{statistics.mean(after):.3f}", f"{sent:,.0f}"]) + " |")


if __name__ == "__main__":
    main()
