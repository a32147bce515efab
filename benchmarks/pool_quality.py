"""Do walsh pools learn as well as gaussian ones? Raw results, one JSON line per run; started again, it goes on.

    python benchmarks/pool_quality.py MODEL DATA_FILE RESULTS.jsonl [--steps 300] [--pools 8] [--seconds 3600]
    python benchmarks/pool_quality.py --report RESULTS.jsonl

Every run tunes the model with two-sided steps from the same weights and is measured by its held-out loss. First each
kind of pool and each K picks its step size on two pools that are not used again; then all kinds run on the same pool
keys, batches and seed draws, so that their differences are paired. Runs of one kind and K go side by side, their
weights stacked, which on a small model takes a third of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.examples import IGNORE, Batch, batches, collate, tokenise
from fedtune_strategies.language.model import load_model
from fedtune_strategies.seed_space import make_pool, tuned_parameters

KINDS = {"gaussian": ("gaussian", 1), "walsh, B = K": ("walsh", 1), "walsh, B = 16 K": ("walsh", 16)}
TUNING_POOLS = (1, 2)  # the pools of the comparison follow
EPS, BATCH, SEQ_LENGTH, HELD_OUT, LONGEST = 1e-3, 4, 64, 256, 80
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, n - 1 degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pools", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--lrs", type=float, nargs="+", default=[4e-5, 6e-5, 9e-5])
    parser.add_argument("--seconds", type=float, default=3600, help="start no further group of runs after so long")
    args = parser.parse_args()
    if args.report:
        print(report(read(args.report)))
        return
    torch.set_num_threads(1)
    deadline = time.monotonic() + args.seconds
    bench = Bench(args.model, args.data)
    print(f"held-out loss before: {bench.before:.4f}")
    for size, kind in itertools.product(args.sizes, KINDS):
        for phase in (tuning, comparison):
            done = read(args.results)
            missing = [job for job in phase(args, done, kind, size) if not any(job.items() <= r.items() for r in done)]
            if not missing:
                continue
            if time.monotonic() > deadline:
                print("time is up: start again to go on")
                return
            with args.results.open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in bench(kind, size, missing))
    print(report(read(args.results)))


def tuning(args: argparse.Namespace, done: list[dict], kind: str, size: int) -> Iterator[dict]:
    """Short runs that find the step size."""
    for lr, pool in itertools.product(args.lrs, TUNING_POOLS):
        yield {"kind": kind, "size": size, "lr": lr, "pool": pool, "steps": args.steps * 2 // 3}


def comparison(args: argparse.Namespace, done: list[dict], kind: str, size: int) -> Iterator[dict]:
    """Runs that count, at the best step size."""
    lr = best_lr(done, kind, size)
    for pool in range(max(TUNING_POOLS) + 1, max(TUNING_POOLS) + 1 + args.pools):
        yield {"kind": kind, "size": size, "lr": lr, "pool": pool, "steps": args.steps}


def best_lr(done: list[dict], kind: str, size: int) -> float:
    trials: dict[float, list[float]] = {}
    for r in done:
        if r["pool"] in TUNING_POOLS and r["kind"] == kind and r["size"] == size:
            trials.setdefault(r["lr"], []).append(r["loss"])
    return min(trials, key=lambda lr: statistics.mean(trials[lr]))


class Bench:
    """The model, its base weights and the data, loaded once."""

    def __init__(self, model: str, data: str) -> None:
        language = load_model(model)
        self.model = language.model
        self.base = {name: p.detach().clone() for name, p in tuned_parameters(self.model).items()}
        rows = [row for row in read_rows(data) if len(text(row.prompt)) < LONGEST and len(row.response) < LONGEST]
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        self.train = tokenise(rows[HELD_OUT:], language.tokenizer, SEQ_LENGTH)
        held_out = tokenise(rows[:HELD_OUT], language.tokenizer, SEQ_LENGTH)
        self.held_out = [collate(held_out, range(i, i + 32)) for i in range(0, HELD_OUT, 32)]
        self.before = self.evaluate({name: value[None] for name, value in self.base.items()})[0]

    @torch.no_grad()
    def __call__(self, kind: str, size: int, jobs: list[dict]) -> list[dict]:
        """Tune from the base weights, all jobs at once, as `local_steps` does in place; return what was measured."""
        started, steps = time.process_time(), jobs[0]["steps"]
        weights = {name: value.repeat(len(jobs), *[1] * value.dim()) for name, value in self.base.items()}
        name, wider = KINDS[kind]
        pools = [make_pool(name, 1000 + job["pool"], size, wider * size if name == "walsh" else None) for job in jobs]
        draws = [np.random.default_rng(job["pool"]).integers(0, size, steps).tolist() for job in jobs]
        data = zip(*(batches(self.train, BATCH, steps, (job["pool"],)) for job in jobs), strict=True)
        slopes = np.zeros((steps, len(jobs)))

        def move(moves: list[list[tuple[int, float]]]) -> None:
            for (name, stacked), run in itertools.product(weights.items(), range(len(jobs))):
                pools[run].move(name, stacked[run], moves[run], out=stacked[run])

        pending: list[list[tuple[int, float]]] = [[] for _ in jobs]
        for t, batch in enumerate(map(list, data)):
            ks = [draw[t] for draw in draws]
            move([[*moves, (k, EPS)] for moves, k in zip(pending, ks, strict=True)])
            above = losses(self.model, weights, batch)
            move([[(k, -2 * EPS)] for k in ks])
            slopes[t] = (above - losses(self.model, weights, batch)) / (2 * EPS)
            pending = [[(k, EPS - job["lr"] * g)] for k, job, g in zip(ks, jobs, slopes[t], strict=True)]
        move(pending)
        found = zip(jobs, self.evaluate(weights), np.abs(slopes).mean(axis=0), strict=True)
        seconds = round((time.process_time() - started) / len(jobs), 1)
        return [
            job | {"loss": float(loss) if np.isfinite(loss) else 1e9, "g": float(g), "processor_seconds": seconds}
            for job, loss, g in found
        ]

    @torch.no_grad()
    def evaluate(self, weights: dict[str, Tensor]) -> np.ndarray:
        """Held-out loss of every run, in nats a token."""
        runs = len(next(iter(weights.values())))
        tokens = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in self.held_out]
        means = np.stack([losses(self.model, weights, [batch] * runs) for batch in self.held_out])
        return np.average(means, axis=0, weights=tokens)


def text(prompt: str | list[dict[str, str]] | None) -> str:
    return prompt[0]["content"] if isinstance(prompt, list) else prompt or ""


def losses(model: torch.nn.Module, weights: dict[str, Tensor], batch: list[Batch]) -> np.ndarray:
    """Mean loss over response tokens of every run, with its own weights and its own batch."""

    def loss(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        output = torch.func.functional_call(model, weights, (), {"input_ids": ids, "use_cache": False})
        target = labels[:, 1:]
        found = output.logits[:, :-1].log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return -(found * (target != IGNORE)).sum() / (target != IGNORE).sum()

    # Padding on the right does not reach a causal model's earlier positions: no mask is needed.
    ids, labels = (
        torch.stack(
            [torch.nn.functional.pad(one[key], (0, SEQ_LENGTH - one[key].shape[1]), value=fill) for one in batch]
        )
        for key, fill in (("input_ids", 0), ("labels", IGNORE))
    )
    return torch.func.vmap(loss)(weights, ids, labels).double().numpy()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: list[float]) -> str:
    half = T95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.4f} ± {half:.4f}"


def report(done: list[dict]) -> str:
    """Table of held-out losses (mean and 95 % interval) and of paired differences to gaussian."""
    lines = ["| K | pool | step size | pools | held-out loss | minus gaussian, paired |", "|---|---|---|---|---|---|"]
    compared = [result for result in done if result["pool"] not in TUNING_POOLS]
    for size in sorted({result["size"] for result in compared}):
        runs = {k: {r["pool"]: r for r in compared if r["kind"] == k and r["size"] == size} for k in KINDS}
        for kind, of_pool in runs.items():
            found = {pool: result["loss"] for pool, result in of_pool.items()}
            pairs = [loss - runs["gaussian"][pool]["loss"] for pool, loss in found.items() if pool in runs["gaussian"]]
            if len(pairs) < 2:
                continue
            lrs = "/".join(sorted({f"{result['lr']:g}" for result in of_pool.values()}))
            row = [size, kind, lrs, len(found), interval(list(found.values())).lstrip("+"), interval(pairs)]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    for kind in list(KINDS)[1:]:
        pairs = [
            r["loss"] - g["loss"]
            for r, g in itertools.product(compared, compared)
            if r["kind"] == kind and g["kind"] == "gaussian" and (r["pool"], r["size"]) == (g["pool"], g["size"])
        ]
        if len(pairs) > 1:
            lines.append(f"{kind} minus gaussian over all K, {len(pairs)} pairs: {interval(pairs)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
