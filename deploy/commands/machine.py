"""``fedtune doctor``, ``bench`` and ``version``: what this machine is and can do."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.output import (
    ColumnsOption,
    Format,
    FormatOption,
    NodeSetOption,
    SetOption,
    TokenArgument,
    console,
    node_changes,
    read_token,
    setting,
    show,
)
from deploy.commands.plan import ModelOption, methods, task_seconds
from fedtune_strategies.errors import FedTuneError

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
    token: TokenArgument = "",
    data: Annotated[Path | None, typer.Option(help="Your data: reads all of it, and shows the first bad line.")] = None,
    data_format: Annotated[str, typer.Option("--data-format", help="Format of the data.")] = "auto",
    columns: ColumnsOption = "",
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
    given = node_changes(columns, changes)
    own = Membership("", "", str(data or ""), data_format, model, device, given).node_config()
    if token:
        known = decode_token(read_token(token))
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
    tasks: dict[str, float | None] = {}
    left_out: dict[str, str] = {}
    for name in methods():
        try:
            tasks[name] = task_seconds(name, model, device, given, EXAMPLES)
        except FedTuneError as error:  # such as a library that only this method needs
            left_out[name] = str(error)
    facts: dict[str, Any] = {"tasks": tasks, "left_out": left_out, "link": [_link(one) for one in _joined()]}

    def as_text() -> None:
        console.print(f"{model} on {device}, one task of each method; other work on the machine slows all of it")
        for name, seconds in tasks.items():
            console.print(f"  {name:26}{seconds:10.2f} s" if seconds is not None else f"  {name:26}{'-':>10}")
        for name, line in left_out.items():
            console.print(f"  {name:26}{line}", markup=False)
        for link in facts["link"]:
            console.print(f"  round trip to {link['address']:12}{1000 * link['seconds']:10.1f} ms, TLS included")

    show(facts, form, as_text)


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
