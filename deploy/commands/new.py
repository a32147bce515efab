"""``fedtune new``: what an integrator begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.output import Format, FormatOption, console, show

app = typer.Typer(no_args_is_help=True, help="Begin a tuning method of your own.")


@app.callback()
def new() -> None:
    """Begin a tuning method of your own."""


@app.command("method")
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method: small letters and digits.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make. Default: one of the method's name, here.")] = None,
    form: FormatOption = Format.text,
) -> None:
    """Make a package with a strategy, a node's side and tests, that works as it stands; see docs/integrator.md."""
    from deploy.new_method import write_method

    folder = out or Path(name)
    written = write_method(name, folder)

    def as_text() -> None:
        for file in written:
            console.print(f"Wrote {file}", markup=False)
        console.print(f"Next: `pip install --no-deps --editable {folder}`, `pytest {folder}`,", markup=False)
        console.print(f"`fedtune run --method {name}` where it is installed on server and nodes", markup=False)

    show({"folder": folder, "files": written}, form, as_text)
