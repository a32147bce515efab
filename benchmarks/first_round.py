"""Do the defaults ruin a model, or let it sleep? Held-out loss after rounds of FedKSeed with nothing set, in memory.

    python benchmarks/first_round.py tiny|stories|FOLDER [--rounds 1] [--set KEY=VALUE ...]

"tiny" is the embedded model on its own tasks, "stories" the model of 260 thousand parameters on Dolly, and FOLDER any
model on Dolly; two nodes of unlike categories, the first 64 held-out rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from comparison.protocols import STORIES, dolly, tiny

from client_app.node import Node
from deploy.commands.output import setting
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the run configuration")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        files = tiny(Path(folder)) if args.model == "tiny" else dolly(Path(folder), 0.5, 2)
        settings = {
            "model.name": {"tiny": "fedtune-tiny", "stories": str(STORIES)}.get(args.model, args.model),
            "num-server-rounds": args.rounds,
            "train.seq-length": 96,
            "strategy.min-nodes": 2,
            "eval.data": str(files.test),
            "eval.max-examples": 64,
            "eval.answers": 0,
            "run.dir": f"{folder}/run",
            **dict(map(setting, args.set)),
        }
        nodes = {i: Node(settings, {"name": f"node-{i}", "data": str(files.nodes[i])}, i) for i in range(2)}
        execute(InMemoryGrid({i: node.handle for i, node in nodes.items()}), settings, run_id=1)
        ledger = Ledger.read(Path(folder) / "run")
        losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
        steps = [record.body.get("lr", 0.0) for record in ledger.records("reply")]
    print(
        args.model,
        *args.set,
        " ".join(f"{loss:.3f}" for loss in losses),
        "steps",
        " ".join(f"{lr:.3g}" for lr in steps),
    )
    print(f"{time.process_time() - start:.0f} s of the processor")


if __name__ == "__main__":
    main()
