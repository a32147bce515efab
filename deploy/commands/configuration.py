"""``fedtune config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.padding import Padding

from deploy.commands.output import Format, FormatOption, console, show
from fedtune_strategies.errors import ConfigError


def config(
    pattern: Annotated[str, typer.Argument()] = "",
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the defaults as TOML, for `flwr run --run-config`.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Write the keys of all methods into `[tool.flwr.app.config]` of this pyproject.toml.", exists=True
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="The method whose keys to show.")] = "",
    form: FormatOption = Format.text,
) -> None:
    """Show the run configuration: every key that a method reads, its default, what it does.

    PATTERN keeps the keys that contain it: `fedtune config train --method fedcybgd`.
    """
    from fedtune_strategies.run_config import app_defaults, as_toml, defaults

    if write:
        write.write_text(with_run_config(write.read_text(), as_toml(app_defaults())))
    elif toml:
        typer.echo(as_toml(defaults(method)), nl=False)
    else:
        _show_keys(pattern, method, form)


def with_run_config(project: str, table: str) -> str:
    """Replace the ``[tool.flwr.app.config]`` table in the text of a pyproject.toml."""
    heading = "[tool.flwr.app.config]\n"
    before, found, after = project.partition(heading)
    if not found:
        raise ConfigError(f"no line {heading.strip()} in this file: add it where the run configuration belongs.")
    lines = after.splitlines(keepends=True)
    rest = next((i for i, line in enumerate(lines) if line.startswith(("[", "#"))), len(lines))
    gap = "\n" if lines[rest:] else ""
    return before + heading + table + gap + "".join(lines[rest:])


def _show_keys(pattern: str, method: str, form: Format) -> None:
    from fedtune_strategies.run_config import keys

    shown = [key for key in keys(method) if pattern in key.name]
    if not shown:
        raise ConfigError(f"no key contains {pattern!r}: `fedtune config` shows all of them.")

    def as_text() -> None:
        for key in shown:
            default = '""' if key.default == "" else key.default
            console.print(f"[bold]{key.name}[/bold] = {default}")
            console.print(Padding(f"{key.help} [dim]({key.accepted})[/dim]", (0, 0, 0, 4)), soft_wrap=False)

    facts = [{"name": key.name, "default": key.default, "help": key.help, "accepted": key.accepted} for key in shown]
    show(facts, form, as_text)
