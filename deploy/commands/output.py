"""How commands print facts: for a person, or as JSON for a program."""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from deploy.common.join_token import PREFIX
from fedtune_strategies.config import Scalar
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.protocol.door import clean


class Format(StrEnum):
    """What ``--format`` accepts."""

    text = "text"
    json = "json"


# The one argument of every command about a run.
BaseOption = Annotated[
    str, typer.Option("--model", help="The run's base model, where it is not at its old place: folder or Hub id.")
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(help="The run's name, as `fedtune runs` lists it, or its folder. Default: the newest run."),
]
# The one option of every command that prints facts.
FormatOption = Annotated[Format, typer.Option("--format", help="For a person, or as one JSON document on stdout.")]

# A token itself would be in the list of processes, for every account of the machine to read.
TokenArgument = Annotated[
    str,
    typer.Argument(
        envvar="FEDTUNE_TOKEN",
        help="File that holds the join token, or `-` to paste it or read it from standard input.",
    ),
]

# Colours and widths follow the terminal; without one, plain text.
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def words(form: Format) -> Console:
    """Where a command speaks to a person: stdout, or stderr where stdout is a program's."""
    return errors if form is Format.json else console


def log(line: str) -> None:
    """Say on stderr that something happened, and when."""
    errors.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {escape(line)}")


def agree(question: str, form: Format) -> None:
    """Ask a person; whoever says no ends the command with code 1."""
    if not typer.confirm(question, err=form is Format.json):
        raise typer.Exit(1)


def read_token(given: str) -> str:
    """Read a join token from a file, standard input or the environment, which no other account can read.

    Raises `ConfigError`: there is no such file; or it is the token itself.
    """
    if given == "-":
        asked = sys.stdin.isatty()
        return str(typer.prompt("Join token", hide_input=True, err=True)) if asked else sys.stdin.readline()
    file = Path(given).expanduser()
    if len(given) < 1024 and file.is_file():
        return file.read_text(errors="replace").strip()
    if given == os.environ.get("FEDTUNE_TOKEN"):
        return given
    if given.startswith(PREFIX):
        raise ConfigError(
            "a token in a command can be read by every account of this machine: save it as token.txt and give that "
            "name instead, or `-` to paste it"
        )
    raise ConfigError(f"{clean(given, 80)}: no such file; save the join token there, or give `-` to paste it")


def node_changes(columns: str, changes: list[str] | None) -> dict[str, Scalar]:
    """The keys of a node that its owner gave."""
    return dict(map(setting, changes or [])) | ({"columns": columns} if columns else {})


def show(facts: Any, form: Format, as_text: Callable[[], None]) -> None:
    """Print ``facts`` as JSON, or call ``as_text`` to print them for a person."""
    if form is Format.json:
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        as_text()


def setting(text: str) -> tuple[str, Scalar]:
    """Split ``key=value``; the value is read as TOML, and as text where it is none."""
    key, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"--set {text!r}: write it as key=value, such as --set train.lr=1e-4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key that `fedtune config` lists, as `key=value`; repeat for several."),
]
ColumnsOption = Annotated[
    str,
    typer.Option(help="Which column of the data is which, as `prompt=question,completion=answer`; see docs/data.md."),
]
NodeSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change another key of the node, such as `skip-bad=true`; repeat for several. See docs/data.md."
    ),
]
