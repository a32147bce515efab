"""``fedtune try``: talk to a run's model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from deploy.commands.output import BaseOption, Format, FormatOption, RunArgument, console, show, words


def talk(
    run: RunArgument = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Ask this and end; repeat for several.")
    ] = None,
    round: Annotated[int | None, typer.Option(min=0, help="The round; the last one by default.")] = None,
    longest: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 128,
    model: BaseOption = "",
    form: FormatOption = Format.text,
) -> None:
    """Talk to a run's model: the base model and the tuned one answer side by side.

    Type a line and press Enter; Enter alone asks the next prompt of your held-out file, Ctrl-D ends. Both models are
    loaded here; the run may not be over.
    """
    from deploy.operator.runs import find_run
    from server_app.side_by_side import SideBySide

    both = SideBySide(find_run(run), round, longest, model)
    answers: list[dict[str, Any]] = []
    for asked in prompt or _typed(both, form):
        base, tuned = both.ask(asked)
        answers.append({"prompt": asked, "base": base, "tuned": tuned})
        if form is Format.text:
            _print(asked, base, tuned, both.round)
    show(answers, form, lambda: None)


def _typed(both: Any, form: Format) -> Iterator[Any]:
    """Yield what is typed, and held-out prompts for empty lines."""
    held_out = iter(both.prompts)
    if sys.stdin.isatty():
        words(form).print(f"The model after round {both.round}. Enter alone asks a held-out prompt, Ctrl-D ends.")
    while True:
        if sys.stdin.isatty():
            words(form).print("[bold]>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
        elif (asked := next(held_out, None)) is not None:
            yield asked


def _print(asked: Any, base: str, tuned: str, round: int) -> None:
    text = asked if isinstance(asked, str) else asked[-1]["content"]
    table = Table(box=SIMPLE_HEAD, title=escape(str(text)), title_justify="left", title_style="dim", expand=True)
    table.add_column("base model", ratio=1)
    table.add_column(f"after round {round}", ratio=1)
    table.add_row(escape(base), escape(tuned))
    console.print(table, soft_wrap=False)
