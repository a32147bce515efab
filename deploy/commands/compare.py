"""``fedtune compare``: two rounds of one run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from deploy.commands.output import Format, FormatOption, RunArgument, console, show


def compare(
    run: RunArgument = None,
    first: Annotated[int, typer.Option("--from", min=0, help="A round; 0 for the base model.")] = 0,
    second: Annotated[int | None, typer.Option("--to", min=0, help="Another one; the last one by default.")] = None,
    top: Annotated[int, typer.Option(min=0, help="So many of the most changed tensors are shown.")] = 10,
    form: FormatOption = Format.text,
) -> None:
    """Say how far a run's model moved from one round to another, and which tensors moved most."""
    from deploy.operator.runs import find_run
    from server_app.compare import compare_rounds

    change = compare_rounds(find_run(run), first, second)

    def as_text() -> None:
        console.print(
            f"from round {change.first} to {change.second}: {change.relative:.3%} of the weights' length, "
            f"{change.changed:.1%} of the weights differ"
        )
        was, now = ("not measured" if loss is None else f"{loss:.4f}" for loss in change.loss)
        console.print(f"held-out loss: {was} → {now}")
        table = Table("tensor", "moved by", "elements that differ", box=None)
        for tensor in change.tensors[:top]:
            table.add_row(tensor.name, f"{tensor.relative:.3%}", f"{tensor.changed:.1%}")
        if top:
            console.print(table)

    show(asdict(change), form, as_text)
