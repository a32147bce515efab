"""What a round costs besides the work: seconds and bytes of a warm node, over real SuperLink and SuperNodes.

    python benchmarks/round_cost.py [--nodes 2] [--rounds 8] [--seeds 4096] [--steps 200] [--method fedkseed]
        [--ways stream,flower]

Runs twice: over the nodes' streams, and by Flower's messages alone.

Prints, per round, the time from one committed round to the next, of which the node's own work, and the bytes that each
node's connection carried in that time: payload, Flower's envelope, TLS and polls. The first round also loads the model
and downloads the app, so it is shown apart. Writes benchmarks/results/round_cost_<method>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

from deploy.common.app_folder import write_app
from deploy.local.federation import Federation, federation
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger

RESULTS = Path(__file__).parent / "results"
LIMIT_SECONDS = 900


def measure(running: Federation, app: Path, settings: dict, folder: Path) -> list[dict]:
    """Run once; returns a row per round."""
    run_id = running.submit(app, settings | {"run.dir": str(folder)})
    rows: list[dict] = []
    before, asked_status = running.traffic(), time.monotonic()
    limit = time.monotonic() + LIMIT_SECONDS
    ledger = None
    while len(rows) < settings["num-server-rounds"]:
        if time.monotonic() > limit:
            raise SystemExit("the run did not end in time")
        if time.monotonic() - asked_status > 10:
            asked_status = time.monotonic()
            if running.status(run_id).state == "finished:failed":
                raise SystemExit(running.run_log(run_id)[-2000:])
        if ledger is None and (folder / "ledger.sqlite").exists():
            ledger = Ledger.read(folder)
        done = [] if ledger is None else list(ledger.records("round"))
        if ledger is not None and len(done) > len(rows):
            now = running.traffic()
            replies = list(ledger.records("reply", round=done[-1].round))
            start = done[-2].time if len(done) > 1 else next(ledger.records("start")).time
            rows.append(
                {
                    "round": done[-1].round,
                    "seconds": done[-1].time - start,
                    "work": max(reply.body["seconds"] for reply in replies),
                    "payload": statistics.mean(r.body["bytes_down"] + r.body["bytes_up"] for r in replies),
                    "up": statistics.mean(now[node].up - before[node].up for node in now),
                    "down": statistics.mean(now[node].down - before[node].down for node in now),
                }
            )
            before = now
        time.sleep(0.05)
    while not running.status(run_id).finished:
        time.sleep(1)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--method", default="fedkseed")
    parser.add_argument("--ways", default="stream,flower")
    args = parser.parse_args()
    settings = {
        "method.name": args.method,
        "num-server-rounds": args.rounds,
        "strategy.min-nodes": args.nodes,
        "train.batch-size": 1,
        "fedkseed.seeds": args.seeds,
        "train.local-steps": args.steps,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, _ = write_federation(folder / "data", args.nodes)
        nodes = {f"node-{i}": file for i, file in enumerate(files)}
        app = folder / "app"
        with federation(folder / "federation", nodes) as running:
            found = {}
            for way in args.ways.split(","):
                changes = settings | {"stream.listen": "" if way == "stream" else "off"}
                found[way] = measure(running, write_app(app, changes), changes, folder / way)
                show(way, found[way])
    RESULTS.mkdir(exist_ok=True)
    facts = {"settings": settings, "machine": f"{platform.machine()}, {args.rounds} rounds", "ways": found}
    (RESULTS / f"round_cost_{args.method}.json").write_text(json.dumps(facts, indent=1) + "\n")


def show(way: str, rows: list[dict]) -> None:
    """Print a run's rounds."""
    print(f"by {way}:")
    print(
        f"{'round':>5} {'seconds':>8} {'work':>6} {'fixed':>6} {'payload':>9} {'up':>9} {'down':>9} {'in all':>9} bytes"
    )
    for row in rows:
        fixed = row["seconds"] - row["work"]
        print(
            f"{row['round']:>5} {row['seconds']:>8.2f} {row['work']:>6.2f} {fixed:>6.2f} {row['payload']:>9,.0f} "
            f"{row['up']:>9,.0f} {row['down']:>9,.0f} {row['up'] + row['down']:>9,.0f}"
        )
    warm = rows[1:]
    fixed_costs = sorted(row["seconds"] - row["work"] for row in warm)
    total = sorted(row["up"] + row["down"] for row in warm)
    low, middle, high = fixed_costs[0], statistics.median(fixed_costs), fixed_costs[-1]
    print(
        f"warm round: fixed cost {middle:.2f} s ({low:.2f} to {high:.2f}); "
        f"{statistics.median(total):,.0f} bytes a node ({total[0]:,.0f} to {total[-1]:,.0f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
