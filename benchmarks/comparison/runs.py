"""Run entrants over the in-memory grid, search their step sizes, and keep every result: one JSON line a run.

Node and server are those of a real federation; messages are encoded and counted. A study that was interrupted goes
on with the first run that is not in its file.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from client_app.node import Node
from comparison.protocols import Entrant, Files, Protocol
from fedtune_strategies.errors import NodesError
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.evaluation import evaluate
from server_app.run import execute

SEARCH_SEED, SEEDS = 1000, (0, 1, 2)
FACTOR = 3.0
DIVERGED = 1e9
"""Stands for a loss that is not finite, or a run that ended without one."""


@dataclass
class Meter:
    """What one node got, gave and worked in each round: bytes of payload, seconds of processor time."""

    down: Counter[int] = field(default_factory=Counter)
    up: Counter[int] = field(default_factory=Counter)
    cpu: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def around(self, handle: Callable[[str, bytes], tuple[str, bytes]]) -> Callable[[str, bytes], tuple[str, bytes]]:
        """Return the node's handler, metered. A hello is not counted: it loads model and data."""

        def metered(kind: str, payload: bytes) -> tuple[str, bytes]:
            start = time.process_time()
            answer = handle(kind, payload)
            if kind != "hello":
                round = getattr(protocol.decode(kind, payload), "round", 0)
                self.cpu[round] += time.process_time() - start
                self.down[round] += len(payload)
                self.up[round] += len(answer[1])
            return answer

        return metered


def until(spent: Mapping[int, float], round: int) -> float:
    """Sum what was spent in the rounds up to one."""
    return sum(value for number, value in spent.items() if number <= round)


@dataclass
class Watch:
    """The course of a run, written down at every evaluation."""

    meters: list[Meter]
    start: float = field(default_factory=time.process_time)
    evaluating: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def evaluate(self, language: Any, held_out: Any, config: Any, **options: Any) -> dict[str, Any]:
        """Evaluate as the server does, and note what had been spent until then."""
        begin = time.process_time()
        # The next round may be under way: a round is evaluated meanwhile.
        round = len(self.curve) * config.eval.every
        facts = evaluate(language, held_out, config, **options)
        worked = sum(sum(meter.cpu.values()) for meter in self.meters)
        row = {
            "loss": min(facts["eval/loss"], DIVERGED),
            "down": sum(until(meter.down, round) for meter in self.meters),
            "up": sum(until(meter.up, round) for meter in self.meters),
            "nodes_cpu": [until(meter.cpu, round) for meter in self.meters],
            "server_cpu": begin - self.start - self.evaluating - worked,
        }
        self.curve.append(row | ({"rouge": facts["eval/rougeL"]} if "eval/rougeL" in facts else {}))
        self.evaluating += time.process_time() - begin
        return facts


@contextmanager
def watched(meters: list[Meter]) -> Iterator[Watch]:
    """Note the course of the run inside."""
    watch = Watch(meters)
    with mock.patch("server_app.evaluation.evaluate", watch.evaluate):
        yield watch


def run_once(settings: dict[str, Any], files: list[Path], folder: Path) -> dict[str, Any]:
    """Run a federation in this process, one data file a node, in a folder that is removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    flat = settings | {"run.dir": str(folder)}
    nodes = {i: Node(flat, {"name": f"node-{i}", "data": str(file)}, i) for i, file in enumerate(files)}
    meters = [Meter() for _ in nodes]
    grid = InMemoryGrid({i: meters[i].around(node.handle) for i, node in nodes.items()})
    with watched(meters) as watch:
        execute(grid, flat, run_id=1)
    shutil.rmtree(folder)
    return {"curve": watch.curve, "evaluating": watch.evaluating}


def run_settings(protocol: Protocol, own: dict[str, Any], nodes: int = 0) -> None:
    """Run a protocol once with any settings, on its first nodes; print the losses."""
    with tempfile.TemporaryDirectory() as name:
        files = protocol.write(Path(name) / "data")
        chosen = files.nodes[: nodes or None]
        entrant = Entrant("once", {"method.name": "fedkseed", "strategy.min-nodes": len(chosen)} | own, 0.0)
        settings = protocol.run_config(entrant) | {"eval.data": str(files.test)}
        found = run_once(settings, chosen, Path(name) / "run")
    print(*(f"{row['loss']:.3f}" for row in found["curve"]), f"({sum(found['curve'][-1]['nodes_cpu']):.0f} s on nodes)")


def read_runs(results: Path) -> list[dict[str, Any]]:
    """Read a study's runs; final runs that began at different losses were not evaluated alike, and end the command."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    begun = Counter(round(row["curve"][0]["loss"], 3) for row in rows if row["stage"] == "final")
    if len(begun) > 1:
        raise SystemExit(
            f"{results} holds runs of different evaluations: before tuning they are at "
            f"{', '.join(map(str, sorted(begun)))}. Remove the older lines, then run them again."
        )
    return rows


class Study:
    """All runs of one protocol, in one file.

    `results`: the file, one JSON line a run; read first, then appended to.
    `work`: folder for data and running federations.
    `seconds`: no run is started after so long.
    """

    def __init__(self, protocol: Protocol, results: Path, work: Path, seconds: float = math.inf) -> None:
        self.protocol, self.results, self.work = protocol, results, work
        self.end = time.monotonic() + seconds
        self.common = protocol.settings()
        self.files: Files = protocol.write(work / "data")
        self.done = read_runs(results) if results.exists() else []

    def run_all(self, names: list[str], seeds: Iterable[int] = SEEDS) -> None:
        """Search and run the named entrants, federations first, seed by seed: a study may end early."""
        chosen = [entrant for entrant in self.protocol.entrants() if not names or entrant.name in names]
        for central, seed in itertools.product((False, True), seeds):
            for entrant in (one for one in chosen if one.central == central):
                self.result(entrant, self.step_size(entrant), seed, "final")

    def step_size(self, entrant: Entrant) -> float:
        """Return the best of three step sizes after half of the rounds, or of more where the best is the last one."""
        if entrant.tuned_as:
            return self.step_size(next(one for one in self.protocol.entrants() if one.name == entrant.tuned_as))
        losses = {i: self._search(entrant, i) for i in (-1, 0, 1)}
        while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
            beyond = best + (1 if best == max(losses) else -1)
            losses[beyond] = self._search(entrant, beyond)
        return step(entrant, best)

    def _search(self, entrant: Entrant, power: int) -> float:
        try:
            return self.result(entrant, step(entrant, power), SEARCH_SEED, "search")["curve"][-1]["loss"]
        except NodesError:  # no node had a finite loss: the step is far too long
            return math.inf

    def result(self, entrant: Entrant, lr: float, seed: int, stage: str) -> dict[str, Any]:
        """Return a run's result, from the file where it is there."""
        key = {"entrant": entrant.name, "lr": lr, "seed": seed, "stage": stage}
        for row in self.done:
            if {name: row[name] for name in key} == key:
                return row
        if time.monotonic() > self.end:
            raise SystemExit("time is up: call again to continue")
        settings = self.settings(entrant, lr, seed, stage)
        own = {
            name: value for name, value in settings.items() if self.common.get(name) != value and name != "eval.data"
        }
        row = {**key, "settings": own}
        files = [self.files.pooled] if entrant.central else self.files.nodes
        row |= run_once(settings, files, self.work / "run")
        self.done.append(row)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(row)) + "\n")
        print(f"{stage} {entrant.name}: step {lr:g}, seed {seed}: loss {row['curve'][-1]['loss']:.4f}", flush=True)
        return row

    def settings(self, entrant: Entrant, lr: float, seed: int, stage: str) -> dict[str, Any]:
        """Return the run configuration of one run."""
        settings = self.protocol.run_config(entrant) | {"train.lr": lr, "train.seed": seed}
        if stage == "search":
            rounds = settings["num-server-rounds"] // 2
            return settings | {
                "num-server-rounds": rounds, "eval.every": rounds, "eval.answers": 0,
                "eval.data": str(self.files.validation),
            }  # fmt: skip
        return settings | {"eval.data": str(self.files.test)}


def step(entrant: Entrant, power: int) -> float:
    """Return one of the step sizes that are tried."""
    return float(f"{entrant.start * FACTOR**power:.3g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
