"""Where the time goes between the submission of a run and its first round's tasks, over real SuperLink and SuperNodes.

    python benchmarks/start.py [--nodes 2]

Prints, in seconds from the submission, when each process began, and when the run's record tells of each step.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from pathlib import Path

import psutil

from deploy.common.app_folder import write_app
from deploy.common.processes import TOKEN
from deploy.local.federation import Federation, federation
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger

LIMIT_SECONDS = 300
PROCESSES = {
    "flwr-serverapp": "ServerApp begins",
    "flwr-clientapp": "ClientApp begins",
    "client_app.worker": "worker begins",
}


def processes_begin(token: str, seen: dict[str, list[float]], done: threading.Event) -> None:
    """Note when each process of a federation was started."""
    known: set[tuple[int, float]] = set()
    while not done.wait(0.2):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                key = process.pid, process.create_time()
                words = process.cmdline()
                what = next((PROCESSES[word] for word in words if word in PROCESSES), "")
                if key not in known and what and process.environ().get(TOKEN) == token:
                    known.add(key)
                    seen.setdefault(what, []).append(process.create_time())


def measure(running: Federation, app: Path, settings: dict, folder: Path) -> list[tuple[float, str]]:
    """Run once; returns what happened when."""
    seen: dict[str, list[float]] = {}
    done, token = threading.Event(), running.environment[TOKEN]
    watcher = threading.Thread(target=processes_begin, args=(token, seen, done))
    watcher.start()
    start = time.time()
    try:
        running.submit(app, settings | {"run.dir": str(folder)})
        seen["submitted"] = [time.time()]
        limit = time.monotonic() + LIMIT_SECONDS
        while not (folder / "ledger.sqlite").exists() or not Ledger.read(folder).last("round"):
            if time.monotonic() > limit:
                raise SystemExit("the first round did not end in time")
            time.sleep(0.2)
    finally:
        done.set()
        watcher.join()
    for record in Ledger.read(folder).records():
        seen.setdefault(f"recorded: {record.kind}", []).append(record.time)
    return sorted((moment - start, f"{what} {i}") for what, times in seen.items() for i, moment in enumerate(times, 1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    settings = {
        "method.name": "fedkseed",
        "num-server-rounds": 1,
        "strategy.min-nodes": args.nodes,
        "train.batch-size": 1,
        "train.local-steps": 10,
        "fedkseed.seeds": 4096,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, held_out = write_federation(folder / "data", args.nodes)
        settings["eval.data"] = str(held_out)
        nodes = {f"node-{i}": file for i, file in enumerate(files)}
        app = write_app(folder / "app", settings)
        with federation(folder / "federation", nodes) as running:
            for moment, what in measure(running, app, settings, folder / "run"):
                print(f"{moment:7.1f} {what}")


if __name__ == "__main__":
    main()
