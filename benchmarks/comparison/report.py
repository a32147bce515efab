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

# Dark enough to write with, and told apart by the colour-blind; grey for those that are no federation.
COLOURS = ("#0072B2", "#C04000", "#00735C", "#A6427B", "#6A4FB3", "#8A6500", "#000000")
CENTRAL = "#6E6E6E"
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Line:
    """What the seeds of one entrant gave."""

    entrant: Entrant
    lr: float
    runs: list[dict[str, Any]]  # results of its final runs

    def last(self, name: str) -> list[float]:
        """Return a value after the last round, by seed."""
        return [run["curve"][-1][name] for run in self.runs]

    def course(self, value: Any) -> list[float]:
        """Return the mean over seeds of ``value(row of the curve)`` along the curve."""
        return [
            statistics.mean(value(row) for row in rows)
            for rows in zip(*(run["curve"] for run in self.runs), strict=True)
        ]

    def halves(self, name: str) -> list[float]:
        """Return the half-width of the interval over seeds of a value along the curve."""
        return [
            half_width([row[name] for row in rows]) for rows in zip(*(run["curve"] for run in self.runs), strict=True)
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
    return mean if len(values) < 2 else f"{mean} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Return the half-width of the 95 % confidence interval of a mean; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    return T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


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
    """Draw loss against local steps, bytes and seconds, and final loss against bytes, each with its interval."""
    looks = _looks(lines)
    federated = [line for line in lines if not line.entrant.central]
    axes: list[tuple[str, str, list[Line], Any]] = [
        ("rounds", "local steps of all nodes", lines, None),
        ("bytes", "bytes up and down, all nodes", federated, lambda row: row["up"] + row["down"]),
        ("seconds", "processor seconds of all nodes", lines, lambda row: sum(row["nodes_cpu"])),
    ]
    files = []
    for name, label, shown, value in axes:
        figure, axis = _axes(label, log=name != "rounds")
        ends = []
        for line in shown:
            means, halves = line.course(lambda row: row["loss"]), line.halves("loss")
            places = (
                line.course(value) if value else [i * protocol.budget / (len(means) - 1) for i in range(len(means))]
            )
            if name != "rounds":  # nothing is spent before the first round: no place on a log axis
                places, means, halves = places[1:], means[1:], halves[1:]
            axis.plot(places, means, **looks[line.entrant.name], linewidth=1.6)
            low, high = ([mean + sign * half for mean, half in zip(means, halves, strict=True)] for sign in (-1, 1))
            axis.fill_between(places, low, high, color=looks[line.entrant.name]["color"], alpha=0.1, linewidth=0)
            ends.append((line.entrant.name, places[-1], means[-1]))
        files.append(_finish(figure, axis, ends, looks, folder / f"loss-{name}.png"))
    figure, axis = _axes("bytes up and down, whole run, all nodes", log=True)
    ends = []
    for line in federated:
        sent, losses = statistics.mean(line.last("up")) + statistics.mean(line.last("down")), line.last("loss")
        color = looks[line.entrant.name]["color"]
        axis.errorbar(sent, statistics.mean(losses), yerr=half_width(losses), fmt="o", color=color, capsize=3)
        ends.append((line.entrant.name, sent, statistics.mean(losses)))
    files.append(_finish(figure, axis, ends, looks, folder / "pareto.png"))
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
    "table{border-collapse:collapse;margin:1rem 0}img{max-width:100%}"
    "td{border-bottom:1px solid #ccc;padding:.2rem .7rem;text-align:right}td:first-child{text-align:left}"
)


def _rounds(line: Line) -> int:
    return line.runs[0]["settings"]["num-server-rounds"]


def _replies(protocol: Protocol, line: Line) -> int:
    """Replies in a run: a reply brings as many local steps as a node takes in a round."""
    settings = line.runs[0]["settings"]
    steps = next(value for name, value in settings.items() if name.endswith(".local-steps"))
    return protocol.budget // steps


def _looks(lines: list[Line]) -> dict[str, dict[str, Any]]:
    """Give the entrants of one method a colour, and each of them a way of being drawn."""
    families: dict[tuple[Any, ...], list[str]] = {}
    for line in lines:
        settings = line.entrant.settings
        key = (line.entrant.central, *(settings.get(name, "") for name in ("method.name", "fedkseed.estimator")))
        families.setdefault((True,) if line.entrant.central else key, []).append(line.entrant.name)
    colours = iter(COLOURS)
    looks: dict[str, dict[str, Any]] = {}
    for key, names in families.items():
        color = CENTRAL if key == (True,) else next(colours)
        looks |= {name: {"color": color, "linestyle": DASHES[i % 4]} for i, name in enumerate(names)}
    return looks


def _axes(label: str, *, log: bool) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    if log:
        axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("held-out loss, nats a token (band: 95 % interval)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _finish(figure: Any, axis: Any, ends: list[tuple[str, float, float]], looks: dict[str, Any], path: Path) -> Path:
    """Write each line's name beside the plot at the height of its end, pushed apart where they would touch."""
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[2])
    for (name, x, y), place in zip(ends, _apart([y for _, _, y in ends], (high - low) / 26), strict=True):
        color = looks[name]["color"]
        axis.annotate(
            name, (x, y), (1.03, place), textcoords=("axes fraction", "data"), color=color, fontsize=9, va="center",
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "relpos": (0, 0.5), "shrinkA": 0},
        )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _apart(heights: list[float], gap: float) -> list[float]:
    """Move heights, in rising order, as little as keeps a gap between neighbours: the least sum of squares."""
    groups: list[list[float]] = []  # of heights less the gaps below them; each group moves as one
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and statistics.mean(groups[-2]) > statistics.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    means = [statistics.mean(group) for group in groups for _ in group]
    return [mean + i * gap for i, mean in enumerate(means)]


def _as_html(markdown: str) -> str:
    rows = [line.strip("|").split("|") for line in markdown.strip().splitlines()]
    cells = ["".join(f"<td>{html.escape(cell.strip()).replace('**', '')}</td>" for cell in row) for row in rows]
    return "<table><tr>" + "</tr><tr>".join(cells[:1] + cells[2:]) + "</tr></table>"
