"""Table, plots and page from the results of a study."""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from comparison.protocols import Entrant, Protocol
from comparison.runs import read_runs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Line:
    """What the seeds of one entrant gave.

    Attributes
    ----------
    entrant : Entrant
        Who.
    lr : float
        Its step size.
    runs : list of dict
        Results of its final runs.
    """

    entrant: Entrant
    lr: float
    runs: list[dict[str, Any]]

    def last(self, name: str) -> list[float]:
        """Return a value after the last round, by seed."""
        return [run["curve"][-1][name] for run in self.runs]

    def course(self, value: Any) -> list[float]:
        """Return the mean over seeds of ``value(row of the curve)`` along the curve."""
        return [
            statistics.mean(value(row) for row in rows)
            for rows in zip(*(run["curve"] for run in self.runs), strict=True)
        ]

    @property
    def seconds(self) -> float:
        """Processor seconds of all nodes a local step, median of the seeds."""
        return statistics.median(sum(run["curve"][-1]["nodes_cpu"]) for run in self.runs)


def read_lines(protocol: Protocol, folder: Path) -> list[Line]:
    """Read a study's final runs."""
    finals = [row for row in read_runs(folder / "runs.jsonl") if row["stage"] == "final"]
    lines = []
    for entrant in protocol.entrants():
        runs = [row for row in finals if row["entrant"] == entrant.name]
        if runs:
            lines.append(Line(entrant, runs[0]["lr"], runs))
    return lines


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and the half-width of its 95 % confidence interval."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def table(protocol: Protocol, lines: list[Line]) -> str:
    """Make the Markdown table."""
    before = lines[0].runs[0]["curve"][0]
    head = [
        "method", "step size", "held-out loss", "Rouge-L", "up, per reply", "down, per task", "up and down, whole run",
        "node, ms a local step", "server, ms a round",
    ]  # fmt: skip
    out = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    out.append(f"| before tuning | | {before['loss']:.3f} | {before['rouge']:.3f} | | | | | |")
    for line in lines:
        replies = _replies(protocol, line)
        up, down = statistics.mean(line.last("up")), statistics.mean(line.last("down"))
        central = line.entrant.central
        cells = [
            line.entrant.name, f"{line.lr:g}", interval(line.last("loss")), interval(line.last("rouge")),
            "–" if central else size(up / replies), "–" if central else size(down / replies),
            "–" if central else size(up + down), f"{1000 * line.seconds / protocol.budget:.0f}",
            f"{1000 * statistics.median(line.last('server_cpu')) / _rounds(line):.0f}",
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def search_table(folder: Path) -> str:
    """Make the Markdown table of all step sizes that were tried."""
    rows = read_runs(folder / "runs.jsonl")
    tried: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["stage"] == "search":
            tried.setdefault(row["entrant"], {})[row["lr"]] = row["curve"][-1]["loss"]
    out = ["| method | step size: loss on validation data |", "| --- | --- |"]
    for name, losses in tried.items():
        best = min(losses, key=losses.__getitem__)
        cells = [
            f"{'**' if lr == best else ''}{lr:g}: {losses[lr]:.3f}{'**' if lr == best else ''}" for lr in sorted(losses)
        ]
        out.append(f"| {name} | {', '.join(cells)} |")
    return "\n".join(out) + "\n"


def plot(protocol: Protocol, lines: list[Line], folder: Path) -> list[Path]:
    """Draw loss against rounds, bytes and seconds, and final loss against bytes."""
    colours = {line.entrant.name: plt.get_cmap("tab20")(i) for i, line in enumerate(lines)}
    federated = [line for line in lines if not line.entrant.central]
    axes: list[tuple[str, str, list[Line], Any]] = [
        ("rounds", "local steps of all nodes", lines, None),
        ("bytes", "bytes up and down, all nodes", federated, lambda row: row["up"] + row["down"]),
        ("seconds", "processor seconds of all nodes", lines, lambda row: sum(row["nodes_cpu"])),
    ]
    files = []
    for name, label, shown, value in axes:
        figure, axis = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
        for line in shown:
            losses = line.course(lambda row: row["loss"])
            places = (
                line.course(value) if value else [i * protocol.budget / (len(losses) - 1) for i in range(len(losses))]
            )
            first = 1 if name == "bytes" else 0  # nothing has been sent before the first round: no place on a log axis
            style = "--" if line.entrant.central else "-"
            axis.plot(
                places[first:],
                losses[first:],
                style,
                color=colours[line.entrant.name],
                label=line.entrant.name,
                marker=".",
            )
        if name == "bytes":
            axis.set_xscale("log")
        files.append(_finish(axis, figure, label, folder / f"loss-{name}.png"))
    figure, axis = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for line in federated:
        sent = statistics.mean(line.last("up")) + statistics.mean(line.last("down"))
        losses = line.last("loss")
        mean = statistics.mean(losses)
        spread = [[mean - min(losses)], [max(losses) - mean]]
        axis.errorbar(sent, mean, yerr=spread, fmt="o", color=colours[line.entrant.name], label=line.entrant.name)
    axis.set_xscale("log")
    files.append(_finish(axis, figure, "bytes up and down, whole run, all nodes", folder / "pareto.png"))
    return files


def write_report(protocol: Protocol, folder: Path) -> None:
    """Write table.md, the plots and report.html beside the results."""
    lines = read_lines(protocol, folder)
    seeds = sorted({run["seed"] for line in lines for run in line.runs})
    parts = [table(protocol, lines), search_table(folder)]
    (folder / "table.md").write_text("\n".join(parts), encoding="utf-8")
    images = "".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in plot(protocol, lines, folder)
    )
    title = f"FedTune: comparison on {protocol.name}"
    note = (
        f"{protocol.budget} local steps for each method, in {protocol.rounds} rounds of {protocol.asked} nodes with "
        f"{protocol.steps} steps (block methods: as many turns); seeds {', '.join(map(str, seeds))}; mean ± 95 % "
        "confidence interval (Student's t). Bytes are those of the messages, without Flower's envelope and TLS."
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{note}</p>{''.join(map(_as_html, parts))}{images}</html>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    print(parts[0])


STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}img{max-width:36rem}"
    "td{border-bottom:1px solid #ccc;padding:.2rem .7rem;text-align:right}td:first-child{text-align:left}"
)


def _rounds(line: Line) -> int:
    return line.runs[0]["settings"]["num-server-rounds"]


def _replies(protocol: Protocol, line: Line) -> int:
    """Replies in a run: a reply brings as many local steps as a node takes in a round."""
    settings = line.runs[0]["settings"]
    steps = next(value for name, value in settings.items() if name.endswith(".local-steps"))
    return protocol.budget // steps


def _finish(axis: Any, figure: Any, label: str, path: Path) -> Path:
    axis.set_xlabel(label)
    axis.set_ylabel("held-out loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _as_html(markdown: str) -> str:
    rows = [line.strip("|").split("|") for line in markdown.strip().splitlines()]
    cells = ["".join(f"<td>{html.escape(cell.strip()).replace('**', '')}</td>" for cell in row) for row in rows]
    return "<table><tr>" + "</tr><tr>".join(cells[:1] + cells[2:]) + "</tr></table>"
