"""The ``fedtune`` command. Every error that a user can act on ends as one line and its own exit code.

The commands themselves stand in `deploy.commands`, a module per group; here they get their name and their panel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from deploy.commands import ledger, new
from deploy.commands.compare import compare
from deploy.commands.configuration import config
from deploy.commands.demo import demo
from deploy.commands.history import history
from deploy.commands.join import join, leave
from deploy.commands.keys import keys
from deploy.commands.machine import bench, doctor, show_version, version
from deploy.commands.models import evaluate, export
from deploy.commands.parts import parts
from deploy.commands.plan import plan
from deploy.commands.runs import resume, run, runs, status, stop
from deploy.commands.serve import nodes_app, serve
from deploy.commands.talk import talk
from fedtune_strategies.errors import FedTuneError, ResourceError
from fedtune_strategies.folders import keep_private

INTERRUPTED = 130


class _Commands(TyperGroup):
    """Commands whose errors are lines, not traces."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FedTuneError as error:
            typer.echo(f"fedtune: {error}", err=True)
            raise SystemExit(error.exit_code) from None
        except OSError as error:
            if error.filename is None:
                raise
            typer.echo(f"fedtune: {error.filename}: {error.strerror}; choose another folder, or free space", err=True)
            raise SystemExit(ResourceError.exit_code) from None
        except KeyboardInterrupt as interrupt:
            typer.echo(f"fedtune: {str(interrupt) or 'stopped'}", err=True)
            raise SystemExit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    # Rich traces show local variables, and one of them may be a token.
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tune **all** parameters of a language model on data that stays where it is.\n\n"
    "Begin with `fedtune demo`: a whole federation on this machine, in about six minutes.",
)

# The panels of `fedtune --help`, in the order in which they are shown.
PANELS: dict[str, list[Callable[..., None]]] = {
    "Try it": [demo],
    "Operators": [serve, run, status, runs, stop, resume, plan, talk, export, evaluate, compare, parts, keys],
    "Device owners": [join, leave, history, doctor],
    "Everybody": [config, bench, version],
}
NAMES = {evaluate: "eval", talk: "try"}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(NAMES.get(command), rich_help_panel=panel)(command)
app.add_typer(nodes_app, name="nodes", rich_help_panel="Operators")
app.add_typer(ledger.app, name="ledger", rich_help_panel="Operators")
app.add_typer(new.app, name="new", rich_help_panel="Integrators")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of ``fedtune`` itself."""


def main() -> None:
    """Entry point of the ``fedtune`` command."""
    keep_private()
    app()


if __name__ == "__main__":
    main()
