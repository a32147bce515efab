"""What a method achieved and what it cost: from a run's ledger and the bytes counted on the nodes' connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from deploy.common.units import size
from deploy.local.proxy import Traffic
from fedtune_strategies.errors import RunError
from server_app.run_view import Evaluation, RunView


@dataclass(frozen=True)
class Result:
    """One method's run."""

    method: str
    # rounds of the run and nodes of the federation
    rounds: int
    nodes: int
    # the first and the last
    before: Evaluation
    after: Evaluation
    # bytes on all nodes' connections from submission to the end: everything, framework and handshakes included
    traffic: Traffic
    peak_memory: int  # largest resident memory of a node's worker, bytes
    seconds: float  # from submission to the end, evaluation and export included
    model: str  # folder of the tuned model

    @property
    def per_node_and_round(self) -> Traffic:
        """The whole traffic divided by nodes and rounds, bytes."""
        shares = self.nodes * self.rounds
        return Traffic(round(self.traffic.up / shares), round(self.traffic.down / shares))


def summarise(folder: Path, method: str, nodes: int, traffic: Traffic, seconds: float) -> Result:
    """Read the ledger of a run that has finished and was evaluated."""
    view = RunView.of(folder)
    evaluations = list(view.evaluations.values())
    if view.end is None or view.end.kind != "finished" or len(evaluations) < 2:
        raise RunError(f"the run in {folder} has no result yet: see its ledger")
    return Result(
        method=method,
        rounds=view.end.round,
        nodes=nodes,
        before=evaluations[0],
        after=evaluations[-1],
        traffic=traffic,
        peak_memory=max(node.peak_memory for node in view.nodes.values()),
        seconds=seconds,
        model=view.end.body["model"],
    )


def table(results: Sequence[Result]) -> Table:
    """One column for each method."""
    head, *rows = _cells(results)
    shown = Table(*head, box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(results: Sequence[Result]) -> str:
    """The same table as `table`, then sample answers."""
    head, *rows = _cells(results)
    lines = [_row(head), _row(["---", *("---:" for _ in head[1:])]), *map(_row, rows)]
    lines += ["", *(line for sample in samples(results) for line in _quoted(sample))]
    return "\n".join(lines) + "\n"


def as_facts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as ``results.json`` has them."""
    return [{**asdict(result), "per_node_and_round": asdict(result.per_node_and_round)} for result in results]


def samples(results: Sequence[Result], count: int = 3) -> list[dict[str, str]]:
    """Sample answers, evenly spread over the evaluated ones: prompt, expected, before, then one answer by method."""
    asked = results[0].before.answers
    places = [len(asked) * i // count for i in range(min(count, len(asked)))]
    return [
        {
            "prompt": asked[i]["prompt"],
            "expected": asked[i]["reference"],
            "before": asked[i]["answer"],
            **{result.method: result.after.answers[i]["answer"] for result in results},
        }
        for i in places
    ]


QUALITIES = [("held-out loss", "loss", 3), ("perplexity", "perplexity", 2), ("Rouge-L", "rouge_l", 3)]
COSTS: list[tuple[str, Callable[[Result], str]]] = [
    ("up, a node and round", lambda result: size(result.per_node_and_round.up)),
    ("down, a node and round", lambda result: size(result.per_node_and_round.down)),
    ("up and down in all", lambda result: size(result.traffic.up + result.traffic.down)),
    ("rounds", lambda result: str(result.rounds)),
    ("peak memory of a node", lambda result: size(result.peak_memory)),
    ("seconds", lambda result: f"{result.seconds:.0f}"),
]


def _cells(results: Sequence[Result]) -> list[list[str]]:
    """The table's rows, its head first; all methods begin with the same base model."""
    rows = [["", "base", *(result.method for result in results)]]
    for label, name, digits in QUALITIES:
        values = [getattr(one, name) for one in (results[0].before, *(result.after for result in results))]
        rows.append([label, *(f"{value:.{digits}f}" for value in values)])
    return rows + [[label, "", *(value(result) for result in results)] for label, value in COSTS]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _quoted(sample: dict[str, str]) -> list[str]:
    return ["```", *(f"{label:12}  {' '.join(text.split())}" for label, text in sample.items()), "```", ""]
