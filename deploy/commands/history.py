"""``fedtune history``: what left this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from deploy.commands.join import NameOption
from deploy.commands.output import Format, FormatOption, console, show

LastOption = Annotated[int, typer.Option("--last", min=0, help="How many of the newest events; 0 for all.")]


def history(name: NameOption = None, last: LastOption = 50, form: FormatOption = Format.text) -> None:
    """Show what left this machine: when, for which run, round and method, how many bytes, and to whom.

    Also what you agreed to, and which runs were refused. Everything is in `history.jsonl` in the node's folder.
    """
    from client_app.history import LEFT
    from deploy.owner.join import find_membership

    membership = find_membership(name)
    rows = membership.history.rows()
    left = [row for row in rows if row["event"] == LEFT]
    facts = {
        "name": membership.name,
        "to": membership.address,
        "replies": len(left),
        "bytes": sum(row["bytes"] for row in left),
        "waiting": membership.history.waiting(),
        "events": rows[-last:],
    }
    show(facts, form, lambda: _print(facts))


def _print(facts: Mapping[str, Any]) -> None:
    from deploy.common.units import size
    from fedtune_strategies.words import counted

    table = Table("when", "run", "round", "what", "bytes", box=None, header_style="bold", pad_edge=False)
    for row in facts["events"]:
        what, bytes = _told(row)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        table.add_row(when, *map(escape, (row.get("run", ""), str(row.get("round") or ""), what, bytes)))
    console.print(table)
    replies = counted(facts["replies"], "reply", "replies")
    console.print(f"\n{replies}, {size(facts['bytes'])}, left {facts['name']} for {facts['to']}", markup=False)
    if waiting := facts["waiting"]:
        told = "; ".join(waiting["reasons"])
        console.print(f"A run waits for you: {told}. `fedtune join --agree` shows it and asks you", markup=False)


def _told(row: Mapping[str, Any]) -> tuple[str, str]:
    """Say what an event was, and how many bytes left by it."""
    match row["event"]:
        case "left":
            return f"{row['method']}: {row['kind']}", f"{row['bytes']:,}"
        case "agreed":
            return f"you agreed to {row['terms']['methods']}, {row['terms']['rounds']} rounds", ""
        case "refused":
            return f"refused: {'; '.join(row['reasons'])}", ""
    return f"base model {row.get('fingerprint', '')}", ""
