"""What does prefetching save on a slow line? Prints seconds a turn, over real SuperLink and SuperNodes.

    python benchmarks/block_prefetch.py [--bandwidth 500000] [--turns 12] [--steps 20]

The embedded model on four nodes, each behind a proxy that lets through so many bytes a second in either direction. The
same run with and without prefetching; compared are the turns after the first cycle, when blocks travel exactly too,
and that both runs made the same blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from deploy.common.app_folder import write_app
from deploy.local.federation import federation
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger

RESULTS = Path(__file__).parent / "results" / "block_prefetch.json"
NODES, BLOCKS = 4, 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=5e5)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    seconds: dict[bool, list[float]] = {}
    made: dict[bool, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, _ = write_federation(folder / "data", NODES)
        nodes = {f"node-{i}": file for i, file in enumerate(files)}
        with federation(folder / "federation", nodes, bandwidth=args.bandwidth) as running:
            app = write_app(folder / "app", {"method.name": "fedcybgd"})
            for prefetch in (False, True):
                settings = {
                    "method.name": "fedcybgd",
                    "num-server-rounds": args.turns,
                    "strategy.min-nodes": NODES,
                    "train.local-steps": args.steps,
                    "fedcybgd.prefetch": prefetch,
                    "run.dir": str(folder / str(prefetch)),
                }
                run_id = running.submit(app, settings)
                while not running.status(run_id).finished:
                    time.sleep(5)
                rounds = list(Ledger.read(folder / str(prefetch)).records("round"))
                made[prefetch] = [record.body["files"] for record in rounds]
                later = rounds[BLOCKS - 1 :]
                seconds[prefetch] = [b.time - a.time for a, b in itertools.pairwise(later)]
    assert made[False] == made[True], "prefetching changed the result"
    print("| prefetch | seconds a turn, median | from | to |\n|---|---|---|---|")
    for prefetch, values in seconds.items():
        print(f"| {prefetch} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"bandwidth": args.bandwidth, "steps": args.steps, "without": seconds[False], "with": seconds[True]}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
