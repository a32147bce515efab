"""Who is compared, on what: the papers' protocols, scaled down to what a CPU does in minutes.

The settings that all methods share stand in configs/small/<protocol>.toml. A budget is a number of local steps, the
same for every method; in one step a method takes either two forward passes or one forward and one backward pass.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.smollm2 import NAME as SMOLLM2
from deploy.local.smollm2 import fetch_smollm2, smollm2_folder
from fedtune_strategies.language.partition import partition_file
from fedtune_strategies.run_config import defaults
from fedtune_strategies.tiny.tasks import write_federation

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
"""Data that is not part of the project; see docs/comparison.md for what is expected there."""
STORIES = DATA / "models" / "stories260K-hf"

LONGEST = 300  # characters of a row: what about fits in 96 tokens of a vocabulary of 512
ROWS = 1500  # of Dolly, on all nodes together


@dataclass(frozen=True)
class Files:
    """Data of a protocol: one file a node, all of them in one, and held-out files for search and report."""

    nodes: list[Path]
    pooled: Path
    validation: Path
    test: Path


@dataclass(frozen=True)
class Entrant:
    """One line of the table.

    Attributes
    ----------
    name : str
        As shown.
    settings : dict
        What it sets beside the protocol's own settings.
    start : float
        Where the search of its step size begins.
    central : bool
        One node with all data: no federation, the same code.
    tuned_as : str
        Entrant whose step size it takes over, where none is searched for it.
    """

    name: str
    settings: dict[str, Any]
    start: float
    central: bool = False
    tuned_as: str = ""


@dataclass(frozen=True)
class Protocol:
    """A comparison: data, fleet, budget.

    Attributes
    ----------
    name : str
        Its own name, and its file's in configs/small where `config` names no other.
    write : callable
        Writes the data into a folder.
    rounds, steps : int
        Rounds, and local steps of a node in one.
    asked : int
        Nodes asked in a round.
    starts : dict of str to float
        Where the searches begin, by kind of method, where not as usual.
    list_entrants : callable
        Who is compared: `methods`, or `seed_options`.
    """

    name: str
    write: Callable[[Path], Files]
    rounds: int
    steps: int
    asked: int
    starts: dict[str, float] = field(default_factory=dict)
    list_entrants: Callable[[Protocol], list[Entrant]] = lambda protocol: methods(protocol)
    config: str = ""

    @property
    def budget(self) -> int:
        """Local steps of all nodes together."""
        return self.rounds * self.steps * self.asked

    def settings(self) -> dict[str, Any]:
        """Return the settings that all entrants share."""
        settings = read_settings(ROOT / "configs" / "small" / f"{self.config or self.name}.toml")
        if settings.get("model.name") == STORIES.name:
            settings["model.name"] = str(STORIES)
        if settings.get("model.name") == SMOLLM2:
            settings["model.name"] = str(smollm2_folder())
        return settings

    def run_config(self, entrant: Entrant) -> dict[str, Any]:
        """Return an entrant's run configuration, but for its step size, of the settings that its method reads."""
        shared = self.settings() | {"num-server-rounds": self.rounds}
        if entrant.central:
            shared |= {"strategy.fraction-train": 1.0, "strategy.min-nodes": 1}
        known = defaults(entrant.settings["method.name"], entrant.settings)
        return {key: value for key, value in shared.items() if key in known} | entrant.settings

    def entrants(self) -> list[Entrant]:
        """Return who is compared, in the order of the table."""
        return self.list_entrants(self)


def methods(protocol: Protocol) -> list[Entrant]:
    """Return the methods of this project first, then federated baselines, then those without a federation."""
    steps = {"train.local-steps": protocol.steps}
    turns = steps | {"num-server-rounds": protocol.rounds * protocol.asked, "eval.every": protocol.asked}
    # Half the steps for twice the rounds, or most blocks would not have their turn.
    averaged: dict[str, Any] = {
        "train.local-steps": protocol.steps // 2,
        "num-server-rounds": 2 * protocol.rounds,
        "eval.every": 2,
        "fedcybgd.structure": "averaged",
        "fedcybgd.nodes-per-round": protocol.asked,
    }
    pairs: dict[str, Any] = {
        "fedcybgd.layers-per-block": 2,
        "fedcybgd.order": "descending",
        "train.beta1": 0.5,
        "train.lr-schedule": "linear",
        "train.warmup": 0.05,
    }
    alone = {"train.local-steps": protocol.steps * protocol.asked}
    every_layer = {"lora.targets": "all-linear"}
    signs = {"train.upload": "sign"}

    def entrant(name: str, method: str, start: float, own: dict[str, Any], **more: Any) -> Entrant:
        kind = {"fedkseed-pro": "fedkseed", "fedzo": "fedavg"}.get(method, method)
        if method in ("fedavg", "fedit", "fedcybgd"):
            own = {"train.upload": "float32"} | own  # as published
        return Entrant(name, {"method.name": method} | own, protocol.starts.get(kind, start), **more)

    def gradient(seeds: int) -> Entrant:
        own = steps | {"fedkseed.estimator": "gradient", "fedkseed.seeds": seeds}
        start = protocol.starts.get("gradient", 0.01)
        return Entrant(f"seed-space gradient, K = {seeds}", {"method.name": "fedkseed"} | own, start)

    return [
        *map(gradient, (16384, 4096, 1024)),
        entrant("FedKSeed", "fedkseed", 1e-4, steps),
        entrant("FedKSeed-Pro", "fedkseed-pro", 1e-4, steps, tuned_as="FedKSeed"),
        entrant("FedCyBGD", "fedcybgd", 3e-3, turns),
        entrant("FedCyBGD, 1 bit up", "fedcybgd", 3e-3, turns | signs),
        entrant("FedCyBGD, two layers", "fedcybgd", 3e-3, turns | pairs),
        entrant("FedAvg", "fedavg", 1e-3, steps),
        entrant("FedAvg, beta1 0.5", "fedavg", 1e-3, steps | {"train.beta1": 0.5}, tuned_as="FedAvg"),
        entrant("FedAvg, 1 bit up", "fedavg", 1e-3, steps | signs),
        entrant("FedIT (LoRA)", "fedit", 1e-2, steps),
        entrant("FedIT, 1 bit up", "fedit", 1e-2, steps | signs),
        entrant("FedIT, all linear layers", "fedit", 1e-2, steps | every_layer),
        entrant("FedIT, all linear layers, 1 bit up", "fedit", 1e-2, steps | every_layer | signs),
        entrant("FedBAvg", "fedcybgd", 3e-3, averaged, tuned_as="FedCyBGD"),
        entrant("FedZO", "fedzo", 1e-4, steps),
        entrant("central AdamW", "fedavg", 1e-3, alone, central=True, tuned_as="FedAvg"),
        entrant("central LoRA", "fedit", 1e-2, alone, central=True, tuned_as="FedIT (LoRA)"),
        entrant(
            "central blocks (BAdam)", "fedcybgd", 3e-3, turns | {"fedcybgd.rest": "none"},
            central=True, tuned_as="FedCyBGD",
        ),
        # Not FedZO's step: averaging over its nodes makes that smaller, and one node alone diverged with it.
        entrant("central MeZO", "fedzo", 3e-5, alone, central=True),
    ]  # fmt: skip


def seed_options(protocol: Protocol) -> list[Entrant]:
    """Return FedKSeed with several numbers of seeds, local steps and nodes a round, for one number of local steps."""

    def entrant(name: str, seeds: int = 1024, steps: int = protocol.steps, asked: int = protocol.asked) -> Entrant:
        nodes = protocol.settings()["strategy.min-nodes"]
        settings: dict[str, Any] = {
            "method.name": "fedkseed", "fedkseed.seeds": seeds, "train.local-steps": steps,
            "strategy.fraction-train": asked / nodes, "num-server-rounds": protocol.budget // (steps * asked),
        }  # fmt: skip
        return Entrant(name, settings, 1e-4, tuned_as="" if name == BASIC else BASIC)

    return [
        entrant(BASIC),
        *(entrant(f"K = {seeds}", seeds=seeds) for seeds in (256, 4096)),
        *(entrant(f"tau = {steps}", steps=steps) for steps in (protocol.steps // 2, 2 * protocol.steps)),
        *(entrant(f"{asked} nodes a round", asked=asked) for asked in (2, 8)),
    ]


BASIC = "K = 1024, tau = 20, 4 nodes a round"


def dolly(folder: Path, alpha: float, nodes: int = 10, held_out: str = "general_qa") -> Files:
    """Dolly-15K, short rows: Dirichlet over the categories of ten nodes; one category is on no node and is the test."""
    rows = _shuffled(_read(DATA / "dolly15k" / "databricks-dolly-15k.jsonl"))
    short = [row for row in rows if not row["context"] and len(row["instruction"] + row["response"]) < LONGEST]
    seen = [row for row in short if row["category"] not in (held_out, "creative_writing")]
    pooled = _write(folder / "pooled.jsonl", seen[256:][:ROWS])
    files = partition_file(pooled, folder / "nodes", "category", nodes, alpha)
    test = [row for row in short if row["category"] == held_out]
    return Files(files, pooled, _write(folder / "validation.jsonl", seen[:256]), _write(folder / "test.jsonl", test))


def smollm2(folder: Path) -> Files:
    """Fetch the real model, and cut Dolly for four nodes."""
    fetch_smollm2(print)
    return dolly(folder, 0.5, nodes=4)


def natural_instructions(folder: Path, nodes: int = 40, tests: int = 8) -> Files:
    """Natural Instructions: one task a node; the test's tasks are on no node."""
    source = DATA / "superni"
    meta = {row["task"]: row for row in _read(source / "tasks_meta.jsonl")}
    tasks: dict[str, list[dict]] = {}
    for name in sorted(meta):
        definition = meta[name]["definition"]
        text = definition if isinstance(definition, str) else " ".join(definition)
        rows = [
            {"definition": text, "input": row["input"], "output": row["output"], "task": name}
            for row in _read(source / "tasks" / f"{name}.jsonl")
            if len(row["input"]) + len(row["output"][0]) < LONGEST
        ]
        if len(rows) >= 50:
            tasks[name] = rows
    names = _shuffled(list(tasks))
    seen, unseen = names[tests : tests + nodes], names[:tests]
    files = [_write(folder / "nodes" / f"node-{i}.jsonl", tasks[name][10:]) for i, name in enumerate(seen)]
    pooled = _write(folder / "pooled.jsonl", [row for name in seen for row in tasks[name][10:]])
    validation = _write(folder / "validation.jsonl", [row for name in seen for row in tasks[name][:5]])
    return Files(
        files, pooled, validation, _write(folder / "test.jsonl", [row for name in unseen for row in tasks[name][:32]])
    )


def tiny(folder: Path, nodes: int = 4) -> Files:
    """The embedded model's own tasks: each node has two, and one is on no node."""
    files, test = write_federation(folder, nodes)
    rows = [row for file in files for row in _read(file)]
    *_, validation = write_federation(folder / "validation", 1, train_per_task=1, heldout_per_task=12, seed=1)
    return Files(files, _write(folder / "pooled.jsonl", rows), validation, test)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("dolly-0.5", lambda folder: dolly(folder, 0.5), rounds=4, steps=20, asked=4),
        Protocol(
            "fedkseed-options", lambda folder: dolly(folder, 0.5), rounds=4, steps=20, asked=4,
            list_entrants=seed_options, config="dolly-0.5",
        ),
        Protocol("dolly-5.0", lambda folder: dolly(folder, 5.0), rounds=4, steps=20, asked=4),
        Protocol(
            "natural-instructions", natural_instructions, rounds=10, steps=20, asked=2,
            starts={"fedcybgd": 3e-4},
        ),
        Protocol(
            "tiny", tiny, rounds=4, steps=24, asked=4,
            starts={"fedkseed": 3e-4, "fedcybgd": 3e-3, "fedavg": 1e-3, "fedit": 1e-3},
        ),
        Protocol(
            "tiny-long", tiny, rounds=16, steps=24, asked=4,
            starts={"fedkseed": 3e-4, "fedcybgd": 6e-4, "fedavg": 6e-4, "fedit": 6e-4}, config="tiny",
        ),
        Protocol(
            "smollm2", smollm2, rounds=4, steps=8, asked=2,
            starts={"gradient": 2.5e-3, "fedkseed": 3e-6, "fedcybgd": 1e-4, "fedavg": 2e-5, "fedit": 1e-3},
        ),
    )
}  # fmt: skip


def read_settings(path: Path) -> dict[str, Any]:
    """Read a configuration file as `fedtune_strategies.run_config.parse` takes it: flat."""

    def flat(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        parts = [
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            for key, value in table.items()
        ]
        return {key: value for part in parts for key, value in part.items()}

    return flat(tomllib.loads(path.read_text(encoding="utf-8")), "")


def _read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(), which also cuts at separators inside a string
        return [json.loads(line) for line in lines]


def _write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _shuffled(items: list) -> list:
    return random.Random(0).sample(items, len(items))
