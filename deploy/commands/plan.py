"""``fedtune plan``: what each method would cost a node, by formulae at once, and how long it takes here, measured."""

from __future__ import annotations

import contextlib
import signal
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from deploy.commands.output import Format, FormatOption, SetOption, console, log, setting, show

ModelOption = Annotated[str, typer.Option(help="Base model: folder, Hub id, or `fedtune-tiny`.")]
COLUMNS = ("method", "memory", "disk", "up", "down", "link", "task", "whole run", "fits")


def plan(
    model: ModelOption = "fedtune-tiny",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the fleet.")] = 4,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB of memory of a node. Default: what is free here.")
    ] = None,
    link: Annotated[float, typer.Option(min=0.001, help="Mbit/s of a node's link, the slower way.")] = 10.0,
    examples: Annotated[int, typer.Option(min=1, help="Examples of a node.")] = 1000,
    measure: Annotated[
        float, typer.Option("--measure", min=0, help="Most seconds to measure this machine's speed; 0 for none.")
    ] = 60.0,
    changes: SetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Say what each method would cost a node, before anybody trains: memory, bytes, time; and which fits.

    Bytes are shown at once, from formulae (docs/planning.md). Times come one after another: this machine takes a few
    steps of each method, the one with the least memory first. `fedtune bench` on a node compares.
    """
    given = dict(map(setting, changes or [])) | {"model.name": model}
    facts = _planned(model, given, nodes, examples, memory, link)
    if not facts["weights"]:
        measure = 0.0
    end = time.monotonic() + measure
    if form is Format.text and console.is_terminal:
        with Live(_table(facts), console=console, auto_refresh=False) as live:
            for _ in _measured(facts, given, examples, end):
                live.update(_table(facts), refresh=True)
        console.print(_notes(facts, measure), end="")
        return
    for row in _measured(facts, given, examples, end):
        log(f"{row['method']}: {row['measured']}")
    show(facts, form, lambda: console.print(_table(facts), _notes(facts, measure), sep="\n", end=""))


def methods() -> list[str]:
    """The methods that say what they cost."""
    from fedtune_strategies.installed import installed_methods
    from fedtune_strategies.method import load_method

    return [name for name in installed_methods() if load_method(name).cost is not None]


def task_seconds(name: str, model: str, device: str, given: dict[str, Any], examples: int) -> float | None:
    """Time one task of a method on this machine; None where the method does not say how."""
    from fedtune_strategies.language.model import load_model
    from fedtune_strategies.method import load_method
    from fedtune_strategies.run_config import parse

    method = load_method(name)
    if method.seconds is None:
        return None
    config = parse(_keys_of(name, given | {"model.name": model}))
    return method.seconds(config, load_model(model, config.model.dtype, device), examples, time.perf_counter)


def _keys_of(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Keep of the given keys those that a method reads: one command line serves several methods."""
    from fedtune_strategies.run_config import defaults

    known = defaults(method)
    return {key: value for key, value in given.items() if key in known} | {"method.name": method}


def _planned(
    model: str, given: dict[str, Any], nodes: int, examples: int, memory: float | None, link: float
) -> dict[str, Any]:
    import psutil

    from deploy.plan import plan as plan_method
    from deploy.plan import server_memory
    from fedtune_strategies.cost import PROCESSES
    from fedtune_strategies.errors import FedTuneError
    from fedtune_strategies.language.model import check_model
    from fedtune_strategies.language.model_files import is_only_described, model_folder
    from fedtune_strategies.run_config import parse

    folder = model_folder(model)
    described = is_only_described(folder)
    if not described:
        check_model(model)
    available = memory * 1e9 if memory is not None else psutil.virtual_memory().available
    rows, lacking, server = [], {}, 0
    for name in methods():
        try:
            config = parse(_keys_of(name, given))
            one = plan_method(config, folder, nodes, examples)
            server = server or server_memory(config, folder)
        except FedTuneError as error:  # such as a library that only this method needs
            lacking[name] = error
            continue
        facts = {"method": name, **asdict(one), "link_seconds": one.link_seconds(link * 1e6)}
        rounds, prune, fits = config.num_server_rounds, config.run.prune, one.memory + PROCESSES <= available
        facts |= {"rounds": rounds, "fits": fits, "run_record": one.record_bytes(rounds, prune)}
        facts |= {"run_pruned": one.record_bytes(rounds, prune=True)}
        rows.append(facts | {"seconds": None, "run_seconds": None, "measured": ""})
    if not rows:
        raise next(iter(lacking.values()))
    left_out = {name: str(error) for name, error in lacking.items()}
    facts = {"model": model, "weights": not described, "nodes": nodes, "memory": available, "methods": rows}
    facts |= {"left_out": left_out}
    return facts | {"beside": PROCESSES, "server_memory": server}


def _measured(facts: dict[str, Any], given: dict[str, Any], examples: int, end: float) -> Iterator[dict[str, Any]]:
    """Fill in the times, one method after another until the time is up; yields each row that changed."""
    for row in sorted(facts["methods"], key=lambda row: row["memory"]):
        if not row["fits"] or (left := end - time.monotonic()) <= 0:
            continue
        row["measured"] = "measuring"
        yield row
        try:
            with _time_limit(left):
                row["seconds"] = task_seconds(row["method"], facts["model"], "cpu", given, examples)
        except TimeoutError:
            row["measured"] = "not done in time"
        else:
            row["measured"] = "" if row["seconds"] is None else f"{row['seconds']:.1f} s a task"
        if row["seconds"] is not None:
            row["run_seconds"] = (row["tasks"] * row["seconds"] + row["link_seconds"]) * row["rounds"]
        yield row


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` when the time is up; a step that has begun is not waited for."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _table(facts: dict[str, Any]) -> Table:
    from deploy.common.units import clock, size

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in facts["methods"]:
        bytes_ = [size(row[key]) for key in ("memory", "disk", "up", "down")]
        times = [clock(row[key]) if row[key] is not None else "-" for key in ("link_seconds", "seconds", "run_seconds")]
        if row["measured"] == "measuring":
            times[1] = "…"
        mark = "[green]✓[/green]" if row["fits"] else "[red]✗[/red]"
        table.add_row(row["method"], *bytes_, *times, mark)
    return table


def _notes(facts: dict[str, Any], measure: float) -> str:
    from deploy.common.units import size
    from fedtune_strategies.words import counted

    late = [row["method"] for row in facts["methods"] if row["fits"] and row["run_seconds"] is None]
    more = f"Not measured within {measure:.0f} s (--measure): {', '.join(late)}.\n" if late and measure else ""
    more += "" if facts["weights"] else "It is planned by its config.json: there are no weights to check or measure.\n"
    more += "".join(f"Left out, {name}: {line}\n" for name, line in facts["left_out"].items())
    records = [f"{row['method']} {size(row['run_record'])} ({size(row['run_pruned'])})" for row in facts["methods"]]
    listed = ", ".join(record.replace(" ", "\N{NO-BREAK SPACE}") for record in records)
    line = f"The server's record of the run takes (with run.prune = true): {listed}."
    more += textwrap.fill(line, 80, break_on_hyphens=False)
    own, beside = size(facts["memory"]), size(facts["beside"])
    return (
        f"{facts['model']}, {counted(facts['nodes'], 'node')}. Of a node's worker: memory, disk; of a round: payload\n"
        "up and down, and its time on the link; of this machine: time of a task and of the run.\n"
        f"✓ is for {own} of memory, {beside} of it for what runs beside the worker.\n"
        f"The server holds at least {size(facts['server_memory'])} in memory.\n{more}\n"
    )
