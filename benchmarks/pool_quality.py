"""Do walsh pools learn as well as gaussian ones? Raw results, one JSON line per run; started again, it goes on.

    python benchmarks/pool_quality.py MODEL_FOLDER DATA_FILE RESULTS.jsonl [--steps 500] [--pools 6] [--seconds 3600]

Every run tunes the model with two-sided steps from the same weights and is measured by its held-out loss. First each
kind of pool and each K picks its step size on one pool that is not used again; then all kinds run on the same pool
keys, batches and seed draws, so that their differences are paired. `python benchmarks/pool_quality.py --report
RESULTS.jsonl` prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.examples import batches, collate, tokenise
from fedtune_strategies.language.loss import response_loss, token_losses
from fedtune_strategies.language.model import load_model
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import local_steps

KINDS = {"gaussian": ("gaussian", None), "walsh": ("walsh", 1), "walsh, 16 K to a block": ("walsh", 16)}
SIZES = (256, 1024, 4096)
LEARNING_RATES = (5e-5, 1e-4, 2.5e-5)
EPS, BATCH, SEQ_LENGTH, HELD_OUT = 1e-3, 4, 64, 256
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, n - 1 degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pools", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3600, help="start no further run after so long")
    args = parser.parse_args()
    if args.report:
        print(report(read(args.report)))
        return
    torch.set_num_threads(1)
    deadline = time.monotonic() + args.seconds
    run = Bench(args.model, args.data)
    done = read(args.results)
    for job in jobs(done, args.steps, args.pools):
        if time.monotonic() > deadline:
            break
        started = time.monotonic()
        result = job | run(**job) | {"seconds": round(time.monotonic() - started, 1)}
        done.append(result)
        with args.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(report(done))


def jobs(done: list[dict], steps: int, pools: int) -> Iterator[dict]:
    """Runs that are missing: the search for step sizes (pool 0), then pools 1, 2, … for every kind and size."""

    def missing(job: dict) -> bool:
        return not any(job.items() <= result.items() for result in done)

    for lr in LEARNING_RATES:
        for size in SIZES:
            for kind in KINDS:
                job = {"kind": kind, "size": size, "lr": lr, "pool": 0, "steps": 200}
                if missing(job):
                    yield job
    for pool in range(1, pools + 1):
        for size in SIZES:
            for kind in KINDS:
                job = {"kind": kind, "size": size, "lr": best_lr(done, kind, size), "pool": pool, "steps": steps}
                if missing(job):
                    yield job


def best_lr(done: list[dict], kind: str, size: int) -> float:
    trials = [r for r in done if r["pool"] == 0 and r["kind"] == kind and r["size"] == size]
    return min(trials, key=lambda result: result["loss"])["lr"]


class Bench:
    """The model, its base weights and the data, loaded once."""

    def __init__(self, model: str, data: str) -> None:
        language = load_model(model)
        self.model = language.model
        self.base = {name: p.detach().clone() for name, p in tuned_parameters(self.model).items()}
        rows = [row for row in read_rows(data) if len(row.prompt[0]["content"]) < 80 and len(row.response) < 80]
        self.train = tokenise(rows[HELD_OUT:], language.tokenizer, SEQ_LENGTH)
        held_out = tokenise(rows[:HELD_OUT], language.tokenizer, SEQ_LENGTH)
        self.held_out = [collate(held_out, range(i, min(i + 32, len(held_out)))) for i in range(0, len(held_out), 32)]

    def __call__(self, kind: str, size: int, lr: float, pool: int, steps: int) -> dict:
        """Tune from the base weights; return what was measured."""
        with torch.no_grad():
            for name, parameter in tuned_parameters(self.model).items():
                parameter.copy_(self.base[name])
        name, wider = KINDS[kind]
        chosen = make_pool(name, 1000 + pool, size, None if wider is None else wider * size)
        draws = np.random.default_rng(pool).integers(0, size, steps)
        found = local_steps(
            self.model, chosen, response_loss, batches(self.train, BATCH, steps, (pool,)), draws, eps=EPS, lr=lr
        )
        loss = self.evaluate()
        return {"loss": loss if np.isfinite(loss) else 1e9, "g": float(np.nanmean(np.abs(found.g)))}

    def evaluate(self) -> float:
        """Held-out loss, in nats a token."""
        with torch.no_grad():
            return float(torch.cat([token_losses(self.model, batch) for batch in self.held_out]).mean())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: list[float]) -> str:
    half = T95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.4f} ± {half:.4f}"


def report(done: list[dict]) -> str:
    """Table of held-out losses (mean and 95 % interval) and of paired differences to gaussian."""
    lines = ["| K | pool | lr | pools | held-out loss | minus gaussian, paired |", "|---|---|---|---|---|---|"]
    for size in SIZES:
        runs = {k: {r["pool"]: r for r in done if r["pool"] and r["kind"] == k and r["size"] == size} for k in KINDS}
        for kind, of_pool in runs.items():
            losses = {pool: result["loss"] for pool, result in of_pool.items()}
            pairs = [loss - runs["gaussian"][pool]["loss"] for pool, loss in losses.items() if pool in runs["gaussian"]]
            if len(pairs) < 2:
                continue
            rates = "/".join(sorted({f"{result['lr']:g}" for result in of_pool.values()}))
            row = [size, kind, rates, len(losses), interval(list(losses.values())).lstrip("+"), interval(pairs)]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
