"""A run on a terminal: its report as a screen, or as a line for each thing that happened."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.common.units import clock, size
from deploy.status.report import ASKING, phase, report
from fedtune_strategies.words import counted
from server_app.run_view import Round, RunView

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"finished": "green", "running": "cyan", "failed": "red"}
NODE_COLOURS = {"present": "green", "working": "green", "silent": "yellow", "lost": "red", "refused": "red"}
MOST_NODES = 20
MOST_NOTES = 5


class Screen:
    """Everything about a run that fits a screen of 80 columns; drawn from its view each time it is shown."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        shown = report(self._view)
        run = shown["run"]
        yield from _head(run)
        yield _figures(shown)
        if shown["nodes"]:
            yield _nodes(shown["nodes"][:MOST_NODES])
        if (more := len(shown["nodes"]) - MOST_NODES) > 0:
            yield Text(f"  … and {more} more")
        for note in shown["notes"][:MOST_NOTES]:
            at = time.strftime("%H:%M:%S", time.localtime(note["time"]))
            yield Text(f"{at} {_told(note)}", style="yellow")
        if run["message"]:
            yield Text(run["message"], style="red" if run["exit_code"] else "")


class Lines:
    """Says what is new in a run, a line for each round, evaluation, note and what is done between rounds, once."""

    def __init__(self) -> None:
        self._rounds = self._evaluations = self._notes = 0
        self._phase = ""

    def __call__(self, view: RunView) -> list[str]:
        """The lines since the last call."""
        total, evaluations = view.config.get("num-server-rounds", 0), list(view.evaluations.values())
        events = [(one.committed, _round_line(one, total)) for one in view.done[self._rounds :]]
        for one in evaluations[self._evaluations :]:
            events.append((one.time, f"round {one.round}/{total}: held-out loss {one.loss:.4f}"))
        events += [(note["time"], _told(note)) for note in view.notes[self._notes :]]
        lines = [line for _, line in sorted(events, key=lambda event: event[0])]
        now = phase(view)
        lines += [now] if now != self._phase and now not in ("", ASKING) and "replied" not in now else []
        self._rounds, self._evaluations, self._notes = len(view.done), len(evaluations), len(view.notes)
        self._phase = now
        return lines


def _round_line(one: Round, total: int) -> str:
    loss = f", training loss {one.train_loss:.4f}" if one.train_loss is not None else ""
    traffic = f"up {size(one.bytes_up)}, down {size(one.bytes_down)}"
    return f"round {one.number}/{total}: {one.replies} of {one.asked} replies{loss}, {traffic}"


def _told(note: Mapping[str, Any]) -> str:
    return f"{note['kind']}: " + " ".join(filter(None, (note["node"], note["reason"])))


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw numbers as a line of small bars, the newest last."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    return "".join(
        BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for value in shown
    )


def _head(run: dict[str, Any]) -> list[Text | Table]:
    going = run["state"] == "running"
    title = Text.assemble((run["method"], "bold"), f" on {_short(run['model'])}  ", no_wrap=True, overflow="ellipsis")
    title.append(run["state"], style=COLOURS.get(run["state"], "default"))
    title.append(f", {clock(run['seconds'] + (_since(run) if going else 0.0))}")
    left = None if run["seconds_left"] is None else run["seconds_left"] - _since(run)
    if going and left is not None and left > 0:
        title.append(f", {clock(left)} left")
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(run["rounds"], 1), completed=run["round"], width=12)
    round = min(run["round"] + going, run["rounds"])
    grid.add_row(f"  round {round}/{run['rounds']}", bar, f"{run['phase']}, {clock(_since(run))}" if going else "")
    return [title, grid]


def _since(run: dict[str, Any]) -> float:
    """Seconds since the run wrote something."""
    return max(0.0, time.time() - run["updated"]) if run["updated"] else 0.0


def _short(model: str) -> str:
    """A folder's name without its path, no longer than a line has room for."""
    name = Path(model).name if Path(model).is_absolute() else model
    return name if len(name) <= 28 else name[:27] + "…"


def _loss(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:.2e}"


def _figures(report: dict[str, Any]) -> Table:
    grid, totals = Table.grid(padding=(0, 2)), report["totals"]
    for label, values in [
        ("held-out loss", [one["loss"] for one in report["evaluations"] if one["loss"] is not None]),
        ("training loss", [one["train_loss"] for one in report["rounds"] if one["train_loss"] is not None]),
    ]:
        if values:
            grid.add_row(f"  {label}", " → ".join(map(_loss, values[:1] + values[1:][-1:])), sparkline(values, 36))
    if not totals["nodes"]:
        return grid
    grid.add_row(
        "  nodes",
        f"{totals['nodes_alive']} of {totals['nodes']} alive",
        f"{counted(totals['replies'], 'reply', 'replies')}, {totals['refused']} refused",
    )
    grid.add_row("  payload", f"up {size(totals['bytes_up'])}", f"down {size(totals['bytes_down'])}")
    return grid


def _state(node: dict[str, Any]) -> str:
    return "step {}/{}".format(*node["step"]) if node["step"] and node["state"] == "working" else str(node["state"])


def _nodes(nodes: list[dict[str, Any]]) -> Table:
    """The nodes; a long name gives way. How messages travel is shown where they do not all by streams."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    by_flower = any(node["way"] == "flower" for node in nodes)
    table.add_column("  node")
    table.add_column("state", no_wrap=True)
    for name in ("examples", "loss", "up", "down", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    if by_flower:
        table.add_column("by", no_wrap=True)
    for node in nodes:
        table.add_row(
            Text(f"  {node['name']}", no_wrap=True, overflow="ellipsis"),
            Text(_state(node), style=NODE_COLOURS.get(node["state"], "")),
            str(node["examples"]),
            "-" if node["loss"] is None else _loss(node["loss"]),
            *(size(node[key]) for key in ("bytes_up", "bytes_down", "peak_memory")),
            *([node["way"] or "-"] if by_flower else []),
        )
    return table
