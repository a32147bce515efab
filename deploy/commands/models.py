"""``fedtune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Option(help="The run's folder, `run.dir`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    round: Annotated[
        int | None, typer.Option(min=0, help="The round; the last one by default, 0 for the base model.")
    ] = None,
) -> None:
    """Write the model after any round of a run as a Hugging Face folder, also while the run goes on."""
    from server_app.export import export_round

    done = export_round(run, round, out)
    typer.echo(f"{out}: the model after round {done}")
