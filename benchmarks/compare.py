"""Every method and baseline side by side, on the same data, for the same number of local steps.

    python benchmarks/compare.py run dolly-0.5 [--only FedKSeed --only FedAvg] [--seeds 3]
    python benchmarks/compare.py report dolly-0.5
    python benchmarks/compare.py once dolly-0.5 --set train.lr=auto [--model FOLDER] [--nodes 2]

`run` searches each method's step size on validation data, then runs it with several seeds; interrupted, it continues
where it stopped. `report` writes table, plots and an HTML page from the results, benchmarks/results/comparison/.
`once` is one run of any settings on a protocol's data, its losses printed and nothing kept.
How to read them: docs/comparison.md. The protocols are in benchmarks/comparison/protocols.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from pathlib import Path

import torch
from comparison.protocols import PROTOCOLS
from comparison.runs import SEEDS, Study, run_settings

from deploy.commands.output import setting

RESULTS = Path(__file__).parent / "results" / "comparison"


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "once"))
    parser.add_argument("protocol", choices=sorted(PROTOCOLS))
    parser.add_argument("--only", action="append", default=[], help="an entrant by name; may be repeated")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--set", action="append", default=[], help="once: KEY=VALUE of the run configuration")
    parser.add_argument("--model", default="", help="once: another model than the protocol's")
    parser.add_argument("--nodes", type=int, default=0, help="once: so many of the protocol's nodes")
    args = parser.parse_args()
    folder = RESULTS / args.protocol
    if args.what == "report":
        from comparison.report import write_report

        write_report(PROTOCOLS[args.protocol], folder)
        return
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.what == "once":
        own = dict(map(setting, args.set)) | ({"model.name": args.model} if args.model else {})
        run_settings(PROTOCOLS[args.protocol], own, args.nodes)
        return
    with tempfile.TemporaryDirectory() as work:
        study = Study(PROTOCOLS[args.protocol], folder / "runs.jsonl", Path(work), args.minutes * 60)
        study.run_all(args.only, range(args.seeds))


if __name__ == "__main__":
    main()
