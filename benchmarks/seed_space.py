"""Speed of the seed space on this machine, each operation against its limit and the published way, in one run.

    python benchmarks/seed_space.py [--parameters 105e6] [--sizes 4096 16384 65536 1048576] [--threads 2] [--repeats 7]

Operations take turns, so that other load on the machine falls on all of them; processor seconds, summed over threads,
feel that load less than the clock does. The published way (generate each
seed's directions again with ``torch.manual_seed`` and ``normal_``, and add) is timed for 4 seeds and multiplied.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from fedtune_strategies.seed_space import Pool, fingerprint, make_pool

EDGE = 2560  # matrices of so many rows and columns
SAMPLE = 4  # seeds for which the published way is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=105e6)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384, 65536, 1 << 20])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.parameters / 1e6:.0f} M float32 parameters, {args.device}, {args.threads} threads,",
        end=" ",
    )
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    times = measure(operations(round(args.parameters), args.sizes, args.device), args.repeats, args.device)
    print(table(times, round(args.parameters), args.sizes[0]))


def operations(parameters: int, sizes: list[int], device: str) -> dict[str, Callable[[], object]]:
    """What is timed: rebuilding and projecting for every K, and the rest for the first of them."""
    size = sizes[0]
    count = max(1, parameters // EDGE**2)
    base = {f"layers.{i}.weight": torch.randn(EDGE, EDGE, device=device) * 0.02 for i in range(count)}
    weights = {name: tensor.clone() for name, tensor in base.items()}
    z = torch.randn(EDGE, EDGE, device=device)
    theta = torch.full((size,), 1e-4)
    walsh, gaussian = make_pool("walsh", 1, size), make_pool("gaussian", 1, size)
    narrow = make_pool("walsh", 1, size, 1 << (size - 1).bit_length())
    first = {next(iter(base)): base[next(iter(base))][:256]}  # the gaussian rebuild is timed on a tenth of one matrix
    few = torch.zeros(size).index_fill(0, torch.arange(64), 1e-4)

    def published() -> None:
        for k in range(SAMPLE):
            torch.manual_seed(k)
            for weight in weights.values():
                weight.add_(z.normal_(), alpha=1e-9)

    found: dict[str, Callable[[], object]] = {
        "copy": lambda: [weights[name].copy_(tensor) for name, tensor in base.items()],
        "read": lambda: [weight.view(-1).view(torch.int64).sum() for weight in weights.values()],
        "fingerprint": lambda: fingerprint(weights),
        f"walsh rebuild, B = K = {size}": lambda: narrow.rebuild_model(weights, base, theta),
        "add_": lambda: [weight.add_(z, alpha=1e-9) for weight in weights.values()],
        "walsh W + c z": lambda: [walsh.perturb(name, w, 7, 1e-9, out=w) for name, w in weights.items()],
        "gaussian W + c z": lambda: [gaussian.perturb(name, w, 7, 1e-9, out=w) for name, w in weights.items()],
        "gaussian rebuild": lambda: [gaussian.rebuild(name, w, few) for name, w in first.items()],
        "published way": published,
    }
    for k in sizes:
        pool, point = make_pool("walsh", 1, k), torch.randn(k) * 1e-4
        found[f"walsh rebuild, K = {k}"] = partial(pool.rebuild_model, weights, base, point)
        found[f"walsh project, K = {k}"] = partial(project, pool, base)
    return found


def project(pool: Pool, gradients: dict[str, torch.Tensor]) -> None:
    total = torch.zeros(pool.size)
    for name, gradient in gradients.items():
        pool.project(name, gradient, out=total)


def measure(todo: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """(Seconds by the clock, processor seconds) of every operation and turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    for turn in range(repeats + 1):  # the first turn compiles and warms up
        for name, operation in todo.items():
            started = time.perf_counter(), time.process_time()
            operation()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return times


def nanoseconds(
    times: dict[str, list[tuple[float, float]]], parameters: int, size: int
) -> dict[str, list[list[float]]]:
    """Sorted clock and processor times of every operation, in ns a parameter and for all seeds."""
    n = max(1, parameters // EDGE**2) * EDGE**2
    per = dict.fromkeys(times, 1e9 / n)
    per["gaussian rebuild"] = 1e9 / (256 * EDGE) * size / 64
    per["published way"] = 1e9 / n * size / SAMPLE
    return {
        name: [sorted(per[name] * t for t in of_kind) for of_kind in zip(*ts, strict=True)]
        for name, ts in times.items()
    }


def table(times: dict[str, list[tuple[float, float]]], parameters: int, size: int) -> str:
    """Ratios of medians, by the clock and in processor time; the spread is the smallest and the largest turn."""
    ns = nanoseconds(times, parameters, size)
    limits = {"add_": "add_", "walsh W + c z": "add_", "gaussian W + c z": "add_"}
    lines = [
        "| operation | ns a parameter | spread | limit | times its limit | in processor time | faster than published |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kinds in ns.items():
        limit = ns[limits.get(name, "copy")]
        clock, processor = map(statistics.median, kinds)
        of_limit = [f"{m / statistics.median(values):.3g}" for m, values in zip((clock, processor), limit, strict=True)]
        published = f"{statistics.median(ns['published way'][0]) / clock:,.1f} ×" if "rebuild" in name else ""
        spread = f"{kinds[0][0]:,.3g} to {kinds[0][-1]:,.3g}"
        lines.append(
            "| " + " | ".join([name, f"{clock:,.3g}", spread, limits.get(name, "copy"), *of_limit, published]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
