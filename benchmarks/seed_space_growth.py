"""How the cost of the seed space grows with parameters, seeds and threads: a table and docs/figures/seed-space-*.svg.

    python benchmarks/seed_space_growth.py [--parameters 1e6 1e7 1e8 1.3e9] [--sizes 256 1024 4096 16384 65536]
        [--threads 1 2] [--repeats 3] [--fixed 2.5e7] [--results FILE.json]

One float32 tensor, out of place. Growth with parameters at K = 4096 and with K at `--fixed` parameters, on the largest
number of threads; with threads at the same. The gaussian rebuild and the published way (`torch.manual_seed`, `normal_`,
add, for each seed) are timed on at most a million parameters and few seeds, and multiplied: both are proportional to
parameters times seeds. Times are the best of the repeats, since other load can only add to them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from fedtune_strategies.seed_space import make_pool

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIZE = 4096
MILLION = 1 << 20
SEEDS = 8  # for which the ways that cost K times as much are timed
STYLES = {
    "published way": ("tab:red", "s"),
    "gaussian rebuild": ("tab:orange", "v"),
    "walsh rebuild, B = K": ("tab:blue", "o"),
    "walsh rebuild, B = 16 K": ("tab:green", "D"),
    "walsh W + c z": ("tab:purple", "^"),
    "copy": ("black", "x"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e6, 1e7, 1e8, 1.3e9])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fixed", type=float, default=2.5e7)
    parser.add_argument("--results", type=Path, help="plot from this file where it exists, else write it")
    args = parser.parse_args()
    if args.results and args.results.exists():
        found = json.loads(args.results.read_text())
    else:
        found = {"load": os.getloadavg()[0], "times": list(measure(args))}
        if args.results:
            args.results.write_text(json.dumps(found, indent=1))
    print(f"load of the machine before: {found['load']:.1f}")
    print(table(found["times"]))
    FIGURES.mkdir(exist_ok=True)
    plot(found, round(args.fixed), max(args.threads), FIGURES)


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Seconds of every operation at every point."""
    fixed, threads = round(args.fixed), max(args.threads)
    points = [(round(n), SIZE, threads) for n in args.parameters]
    points += [(fixed, size, threads) for size in args.sizes]
    points += [(fixed, SIZE, t) for t in args.threads]
    for parameters, size, threads in dict.fromkeys(points):
        torch.set_num_threads(threads)
        for operation, seconds in best(parameters, size, args.repeats).items():
            yield {
                "operation": operation, "parameters": parameters, "K": size, "threads": threads, "seconds": seconds
            }  # fmt: skip


def best(parameters: int, size: int, repeats: int) -> dict[str, float]:
    """Least seconds of each operation; they take turns."""
    base, out, theta = torch.full((parameters,), 0.02), torch.empty(parameters), torch.full((size,), 1e-4)
    part = base[:MILLION]
    z, few = torch.empty_like(part), torch.zeros(size).index_fill(0, torch.arange(SEEDS), 1e-4)
    walsh, wide, gaussian = (
        make_pool("walsh", 1, size, 1 << (size - 1).bit_length()),
        make_pool("walsh", 1, size),
        make_pool("gaussian", 1, size),
    )
    times_size = parameters / len(part) * size / SEEDS

    def published() -> None:
        for k in range(SEEDS):
            torch.manual_seed(k)
            out[: len(part)].add_(z.normal_(), alpha=1e-9)

    operations: dict[str, tuple[Callable[[], object], float]] = {
        "copy": (lambda: out.copy_(base), 1),
        "walsh W + c z": (lambda: wide.perturb("w", out, 7, 1e-9, out=out), 1),
        "walsh rebuild, B = 16 K": (lambda: wide.rebuild("w", base, theta, out=out), 1),
        "walsh rebuild, B = K": (lambda: walsh.rebuild("w", base, theta, out=out), 1),
        "gaussian rebuild": (lambda: gaussian.rebuild("w", part, few), times_size),
        "published way": (published, times_size),
    }
    seconds = dict.fromkeys(operations, float("inf"))
    for turn, (name, (operation, factor)) in itertools.product(range(repeats + 1), operations.items()):
        started = time.perf_counter()
        operation()
        if turn:  # the first compiles and touches the memory
            seconds[name] = min(seconds[name], (time.perf_counter() - started) * factor)
    return seconds


def table(times: list[dict]) -> str:
    lines = ["| parameters | K | threads | " + " | ".join(STYLES) + " |", "|---" * (3 + len(STYLES)) + "|"]
    for point, rows in itertools.groupby(times, key=lambda row: (row["parameters"], row["K"], row["threads"])):
        seconds = {row["operation"]: row["seconds"] for row in rows}
        ratios = [f"{seconds[name] / seconds['copy']:,.3g}" for name in STYLES if name != "copy"]
        cells = [f"{point[0] / 1e6:,.0f} M", f"{point[1]:,}", point[2], *ratios, f"{seconds['copy']:.3g} s"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\nAll but the last column in times the copy."


def plot(found: dict, fixed: int, threads: int, folder: Path) -> None:
    times, load = found["times"], f"load of the machine before: {found['load']:.1f}"
    mpl.rcParams["svg.hashsalt"] = "fedtune"  # the same figure gives the same file

    def curve(x: str, y: Callable[[dict], float], axes: plt.Axes, **at: float) -> None:
        for name, (colour, marker) in STYLES.items():
            points = {
                row[x]: y(row)
                for row in times
                if row["operation"] == name and all(row[key] == value for key, value in at.items())
            }
            axes.plot(*zip(*sorted(points.items()), strict=True), marker=marker, color=colour, label=name)
        axes.grid(alpha=0.3)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.suptitle(load, fontsize=8)
    curve("parameters", lambda row: row["seconds"], left, K=SIZE, threads=threads)
    left.set(
        xscale="log", yscale="log", xlabel="parameters", ylabel="seconds", title=f"K = {SIZE:,}, {threads} threads"
    )
    curve("K", lambda row: row["seconds"] / row["parameters"] * 1e9, right, parameters=fixed, threads=threads)
    right.set_xscale("log", base=2)
    right.set(
        yscale="log", xlabel="K", ylabel="ns a parameter", title=f"{fixed / 1e6:.0f} M parameters, {threads} threads"
    )
    right.legend(fontsize=8)
    figure.savefig(folder / "seed-space-growth.svg", metadata={"Date": None})
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    figure.suptitle(load, fontsize=8)
    rows = [row for row in times if row["parameters"] == fixed and row["K"] == SIZE]
    alone = {row["operation"]: row["seconds"] for row in rows if row["threads"] == 1}
    for name, (colour, marker) in STYLES.items():
        points = {row["threads"]: alone[name] / row["seconds"] for row in rows if row["operation"] == name}
        axes.plot(*zip(*sorted(points.items()), strict=True), marker=marker, color=colour, label=name)
    axes.set(xlabel="threads", ylabel="times faster than one thread", xticks=sorted({row["threads"] for row in rows}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(folder / "seed-space-threads.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
