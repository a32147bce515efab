"""A whole federation on this machine, tuning a model by each method in turn: ``fedtune demo``."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from deploy.common.units import clock
from deploy.local.federation import Federation, federation
from deploy.local.proxy import Traffic
from deploy.local.report import Result, as_facts, markdown, samples, summarise, table
from deploy.local.smollm2 import NAME, fetch_smollm2, smollm2_folder
from deploy.status.page import write_page
from fedtune_strategies.config import Scalar
from fedtune_strategies.errors import ConfigError, DataError, ResourceError
from fedtune_strategies.folders import check_ours, make_folder, remove_folder
from fedtune_strategies.run_config import parse
from fedtune_strategies.words import counted

# What suits a model and two cores, by method; everything else is as in the run configuration.
COMMON: dict[str, Scalar] = {"train.seq-length": 64, "eval.answers": 45, "eval.max-new-tokens": 20}
SEEDS: dict[str, Scalar] = {
    "num-server-rounds": 4,
    "fedkseed.seeds": 1024,
    "train.local-steps": 60,
    "train.lr": 4e-4,
}
GRADIENT: dict[str, Scalar] = {"method.name": "fedkseed", "fedkseed.estimator": "gradient", "num-server-rounds": 4}
EMBEDDED: dict[str, dict[str, Scalar]] = {
    "gradient": GRADIENT | {"train.local-steps": 24},
    "fedkseed": SEEDS,
    "fedkseed-pro": SEEDS,
    "fedcybgd": {"num-server-rounds": 6, "train.lr": 3e-4},
}
# Sixty times as large: few short steps, and blocks from the last down, for which a backward pass is short.
SMOLLM2: dict[str, dict[str, Scalar]] = {
    "gradient": GRADIENT | {"train.local-steps": 8},
    "fedcybgd": {"num-server-rounds": 6, "train.local-steps": 16, "train.lr": 3e-4, "fedcybgd.order": "descending"},
}
SHORT: dict[str, Scalar] = {"train.batch-size": 2, "eval.every": 2, "eval.max-examples": 72, "eval.answers": 27}
HELD_OUT = 200  # most examples held out of a user's own file


def run_demo(
    *,
    nodes: int,
    methods: Sequence[str],
    model: str,
    data: Path | None,
    changes: Mapping[str, Scalar],
    out: Path,
    keep: bool,
    console: Console,
    on_results: Callable[[Sequence[Result]], None],
) -> None:
    """Start a federation, run the methods one after another, and show what each did and cost.

    `methods`: names of methods; empty for all that the demo has settings for.
    `model`: base model, as in ``model.name``, or `smollm2.NAME`, which is fetched.
    `data`: a data file to deal out to the nodes; None makes the embedded data.
    `changes`: keys of the run configuration that are to differ from what the demo sets.
    `out`: folder for everything that is written, an absolute path. Earlier results there are replaced.
    `keep`: afterwards leave the federation running until Ctrl-C.
    `on_results`: called once with the results, one for each method.
    Raises `FedTuneError`: something a user can act on; everything that was started has been stopped.
    """
    started = time.monotonic()
    configs = [_config(method, model, nodes, out, changes) for method in methods or _settings(model)]
    methods = [Path(str(config["run.dir"])).name for config in configs]
    for folder in [out / "data", *(out / method for method in methods)]:
        check_ours(folder)
    with _alone(out):
        if model == NAME:
            fetch_smollm2(console.print)
        node_files, _ = _data(out / "data", nodes, data)
        console.print(
            f"[bold]FedTune demo[/bold]: {counted(nodes, 'node')}, {', '.join(methods)}; "
            f"all that is written goes to {out}"
        )
        console.print("Starting `fedtune serve` and a `fedtune join` for each node …")
        with federation(out / "federation", {f"node-{i}": file for i, file in enumerate(node_files)}) as running:
            console.print(
                f"All {nodes} nodes are online after {clock(time.monotonic() - started)}; logs: {out}/federation/logs"
            )
            try:
                results = [_tune(running, config, console) for config in configs]
                _write(results, out)
                write_page(out, out / "status.html")
                on_results(results)
                console.print(f"The whole demo took {clock(time.monotonic() - started)}.")
                if keep:
                    _wait(running, console)
            finally:
                console.print("Stopping the federation …")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder, so that no second demo clears it meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ResourceError(f"another demo is writing to {out}: wait for it, or choose another --out") from None


def _config(method: str, model: str, nodes: int, out: Path, changes: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Make a method's run configuration, checked before anything is started."""
    if method not in _settings(model):
        raise ConfigError(f"unknown method {method!r}: choose from {', '.join(_settings(model))}")
    own: dict[str, Scalar] = {
        "model.name": str(smollm2_folder()) if model == NAME else model,
        "eval.data": str(out / "data" / "heldout.jsonl"),
        "run.dir": str(out / method),
    }
    if taken := own.keys() & changes.keys():
        raise ConfigError(f"the demo sets {', '.join(sorted(taken))}: use --methods, --model, --data and --out")
    suited = {"method.name": method, **COMMON, "strategy.min-nodes": nodes, **_settings(model)[method]}
    config = {**suited, **changes, **own}
    parse(config)
    return config


def _settings(model: str) -> dict[str, dict[str, Scalar]]:
    return {method: SHORT | own for method, own in SMOLLM2.items()} if model == NAME else EMBEDDED


def _tune(running: Federation, config: Mapping[str, Scalar], console: Console) -> Result:
    folder = Path(str(config["run.dir"]))
    method = folder.name
    remove_folder(folder)
    before, started = running.traffic(), time.time()
    running.tune(config, to_stderr=console.stderr)
    after = running.traffic()
    traffic = sum((after[node] - before[node] for node in after), Traffic())
    result = summarise(folder, method, len(running.nodes), traffic, time.time() - started)
    console.print(
        f"[green]✓[/green] {method}: held-out loss {result.before.loss:.3f} → {result.after.loss:.3f} "
        f"in {clock(result.seconds)}",
        highlight=False,
    )
    return result


def _data(folder: Path, nodes: int, source: Path | None) -> tuple[list[Path], Path]:
    """Write one data file for each node and the held-out file."""
    remove_folder(folder)
    make_folder(folder)
    if source is None:
        from fedtune_strategies.tiny.tasks import write_federation

        return write_federation(folder, nodes)
    return _deal(source, folder, nodes)


def _deal(source: Path, folder: Path, nodes: int) -> tuple[list[Path], Path]:
    """Shuffle a user's file, hold some of it out, and deal the rest to the nodes."""
    from fedtune_strategies.language.data import read_records

    records = [record for _, record in read_records(source)]
    random.Random(0).shuffle(records)
    held = min(HELD_OUT, len(records) // 5)
    if held < 1 or len(records) - held < nodes:
        raise DataError(f"{source} has {len(records)} records: too few for {nodes} nodes and a held-out part")
    files = [folder / f"node_{i}.jsonl" for i in range(nodes)]
    parts = [records[held + i :: nodes] for i in range(nodes)]
    for file, part in [*zip(files, parts, strict=True), (folder / "heldout.jsonl", records[:held])]:
        file.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
    return files, folder / "heldout.jsonl"


def _write(results: Sequence[Result], out: Path) -> None:
    (out / "table.md").write_text(markdown(results), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(as_facts(results), indent=2, ensure_ascii=False), encoding="utf-8")


def show_results(results: Sequence[Result], out: Path, console: Console) -> None:
    """Print the table, some answers, and where everything is."""
    console.print(table(results))
    for sample in samples(results):
        for label, text in sample.items():
            console.print(f"[bold]{label:>12}[/bold]  ", end="")
            console.print(" ".join(text.split()) or "(nothing)", markup=False, highlight=False)
        console.print()
    for result in results:
        console.print(f"Model tuned by {result.method}: {result.model}", highlight=False)
    console.print(f"Table: {out / 'table.md'}, figures: {out / 'results.json'}", highlight=False)
    console.print(f"To look at: {out / 'status.html'}", highlight=False)


def _wait(running: Federation, console: Console) -> None:
    home = running.environment["FEDTUNE_HOME"]
    console.print(f"The federation runs until Ctrl-C. In another terminal: FEDTUNE_HOME={home} fedtune run")
    while True:
        running.check()
        time.sleep(1.0)
