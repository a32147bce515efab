"""``fedtune doctor``, ``bench``, ``plan`` and ``version``: what this machine is, can do and would have to do."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.commands.output import Format, FormatOption, NodeSetOption, SetOption, console, setting, show
from fedtune_strategies.words import counted

ModelOption = Annotated[str, typer.Option(help="Base model: folder, Hub id, or `fedtune-tiny`.")]
EXAMPLES = 1000  # of a node, where nobody says
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`.")]


def show_version(wanted: bool) -> None:
    """Print FedTune's version and end, where ``--version`` is given."""
    if wanted:
        console.print(f"fedtune {installed_version('fedtune')}")
        raise typer.Exit()


def version(form: FormatOption = Format.text) -> None:
    """Show the versions that decide whether two machines can work together."""
    facts = {name: installed_version(name) for name in ("fedtune", "flwr", "torch", "transformers", "grpcio")}
    facts["python"] = platform.python_version()

    def as_text() -> None:
        for name, number in facts.items():
            console.print(f"{name:13}{number}")

    show(facts, form, as_text)


def doctor(
    token: Annotated[str, typer.Argument(envvar="FEDTUNE_TOKEN", help="A join token, to check before joining.")] = "",
    data: Annotated[Path | None, typer.Option(help="Your data: reads all of it, and shows the first bad line.")] = None,
    data_format: Annotated[str, typer.Option("--data-format", help="Format of the data.")] = "auto",
    model: ModelOption = "",
    device: DeviceOption = "cpu",
    changes: NodeSetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Look at everything that could be wrong here, with a tick or a cross, and what to do about each cross.

    Looks at the federations that this machine has joined, or at the server of TOKEN before joining. Changes nothing.
    """
    from deploy.common.checks import show_checks
    from deploy.common.join_token import decode_token
    from deploy.owner.doctor import examine, examine_membership
    from deploy.owner.join import Membership, fetch_server_info, memberships
    from fedtune_strategies.errors import FedTuneError

    joined = memberships()
    given = dict(map(setting, changes or []))
    own = Membership("", "", str(data or ""), data_format, model, device, given).node_config()
    if token:
        known = decode_token(token)
        try:
            authority: str | None = fetch_server_info(known)[0]
        except FedTuneError:
            authority = None
        checks = examine(known.address, authority, own)
    elif joined and not data:
        checks = (one for membership in joined for one in examine_membership(membership))
    else:
        server = joined[0] if joined else None
        authority = server.authority.read_text() if server else None
        checks = examine(server.address if server else "", authority, own)
    if form is Format.json:
        found = list(checks)
        show([asdict(one) for one in found], form, lambda: None)
        failed = [one for one in found if one.ok is False]
    else:
        failed = show_checks(checks, console)
    if failed:
        raise typer.Exit(failed[0].exit_code)


def bench(
    model: ModelOption = "fedtune-tiny",
    device: DeviceOption = "cpu",
    changes: SetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Measure this machine: one task of each method, and the way to the server."""
    given = dict(map(setting, changes or []))
    tasks = {name: _task_seconds(name, model, device, given, EXAMPLES) for name in _methods()}
    facts: dict[str, Any] = {"tasks": tasks, "link": [_link(one) for one in _joined()]}

    def as_text() -> None:
        console.print(f"{model} on {device}, one task of each method; other work on the machine slows all of it")
        for name, seconds in tasks.items():
            console.print(f"  {name:26}{seconds:10.2f} s" if seconds is not None else f"  {name:26}{'-':>10}")
        for link in facts["link"]:
            console.print(f"  round trip to {link['address']:12}{1000 * link['seconds']:10.1f} ms, TLS included")

    show(facts, form, as_text)


def plan(
    model: ModelOption = "fedtune-tiny",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the fleet.")] = 4,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB of memory of a node. Default: what is free here.")
    ] = None,
    link: Annotated[float, typer.Option(min=0.001, help="Mbit/s of a node's link, the slower way.")] = 10.0,
    examples: Annotated[int, typer.Option(min=1, help="Examples of a node.")] = 1000,
    measure: Annotated[bool, typer.Option(help="Measure this machine's speed, for estimates of time.")] = True,
    changes: SetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Say what each method would cost a node, before anybody trains: memory, bytes, time; and which fits.

    Nothing is trained. Times are those of this machine: `fedtune bench` on a node compares. The formulae are in
    docs/planning.md.
    """
    import psutil

    from deploy.plan import plan as plan_method
    from fedtune_strategies.config import parse
    from fedtune_strategies.language.model_files import model_folder

    given, folder = dict(map(setting, changes or [])), model_folder(model)
    available = memory * 1e9 if memory is not None else psutil.virtual_memory().available
    rows = []
    for name in _methods():
        config = parse(_keys_of(name, given | {"model.name": model}))
        one = plan_method(config, folder, nodes, examples)
        seconds = _task_seconds(name, model, "cpu", given, examples) if measure else None
        wire = one.link_seconds(link * 1e6)
        rounds = (one.tasks * seconds + wire) * config.num_server_rounds if seconds is not None else None
        rows.append(
            {"method": name, **asdict(one), "seconds": seconds, "link_seconds": wire, "run_seconds": rounds}
            | {"fits": one.memory <= available}
        )
    facts = {"model": model, "nodes": nodes, "memory": available, "methods": rows}
    show(facts, form, lambda: _print_plan(facts))


def _methods() -> list[str]:
    """The methods that say what they cost."""
    from fedtune_strategies.method import installed_methods, load_method

    return [name for name in installed_methods() if load_method(name).cost is not None]


def _keys_of(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Keep of the given keys those that a method reads: one command line serves several methods."""
    from fedtune_strategies.config import defaults

    known = defaults(method)
    return {key: value for key, value in given.items() if key in known} | {"method.name": method}


def _task_seconds(name: str, model: str, device: str, given: dict[str, Any], examples: int) -> float | None:
    import time

    from fedtune_strategies.config import parse
    from fedtune_strategies.language.model import load_model
    from fedtune_strategies.method import load_method

    method = load_method(name)
    if method.seconds is None:
        return None
    config = parse(_keys_of(name, given | {"model.name": model}))
    return method.seconds(config, load_model(model, config.model.dtype, device), examples, time.perf_counter)


def _joined() -> list[Any]:
    from deploy.owner.join import memberships

    return memberships()


def _link(membership: Any) -> dict[str, Any]:
    import statistics
    import time

    from deploy.owner.join import ask

    times = []
    for _ in range(3):
        start = time.perf_counter()
        ask(membership.address, {"do": "hello"}, membership.authority.read_text())
        times.append(time.perf_counter() - start)
    return {"address": membership.address, "seconds": statistics.median(times)}


def _print_plan(facts: dict[str, Any]) -> None:
    from deploy.common.units import clock, size

    table = Table(
        "for one node", *(row["method"] for row in facts["methods"]), box=None, header_style="bold", pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"

    def times(key: str) -> list[str]:
        return [clock(row[key]) if row[key] is not None else "-" for row in facts["methods"]]

    table.add_row("memory", *(size(row["memory"]) for row in facts["methods"]))
    table.add_row("disk, base model", *(size(row["disk"]) for row in facts["methods"]))
    table.add_row("up a round, payload", *(size(row["up"]) for row in facts["methods"]))
    table.add_row("down a round, payload", *(size(row["down"]) for row in facts["methods"]))
    table.add_row("one task on this machine", *times("seconds"))
    table.add_row("on the link a round", *times("link_seconds"))
    table.add_row("whole run", *times("run_seconds"))
    marks = ["[green]✓[/green]" if row["fits"] else "[red]✗[/red]" for row in facts["methods"]]
    table.add_row(f"fits in {size(facts['memory'])}", *marks)
    console.print(f"{facts['model']}, {counted(facts['nodes'], 'node')}")
    console.print(table)
