"""The ``fedtune`` command. Every error that a user can act on ends as one line and its own exit code."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.padding import Padding
from typer.core import TyperGroup

from fedtune_strategies.config import Scalar
from fedtune_strategies.errors import ConfigError, FedTuneError, ResourceError

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
        except KeyboardInterrupt:
            typer.echo("fedtune: stopped", err=True)
            raise SystemExit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tune **all** parameters of a language model on data that stays where it is.\n\n"
    "Begin with `fedtune demo`: a whole federation on this machine, in about six minutes.",
)


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="How many nodes take part, each with data of its own.")] = 4,
    methods: Annotated[
        str, typer.Option(help="Which methods to run, one after another, separated by commas.")
    ] = "fedkseed,fedkseed-pro,fedcybgd",
    model: Annotated[
        str, typer.Option(help="A Hugging Face causal language model: folder or Hub id.")
    ] = "fedtune-tiny",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own data file, dealt out to the nodes. Default: made by rule, a task per node.", exists=True
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key that `fedtune config` lists, as `key=value`; repeat for several."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tuned models, ledgers, logs and the table.")] = Path(
        "out/demo"
    ),
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Leave the federation running afterwards, for runs of your own, until Ctrl-C."),
    ] = False,
) -> None:
    """Run a real federation on this machine and see what each method does and costs.

    Starts a SuperLink and the nodes as processes of their own, connected by gRPC with TLS and node keys on free
    loopback ports; tunes the model by each method in turn; shows a table of loss, perplexity, Rouge-L, bytes, memory
    and time; and stops all of it, also on Ctrl-C.

    The table is written to `table.md` and `results.json` in the folder of `--out`, beside the tuned models.
    """
    from deploy.demo import run_demo

    changed = dict(map(_setting, changes or []))
    run_demo(nodes=nodes, methods=methods.split(","), model=model, data=data, changes=changed, out=out, keep=keep)


@app.command()
def config(
    pattern: Annotated[str, typer.Argument()] = "",
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the defaults as TOML, for `flwr run --run-config`.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the defaults into `[tool.flwr.app.config]` of this pyproject.toml.", exists=True),
    ] = None,
) -> None:
    """Show the run configuration: every key, its default, what it does and what it accepts.

    PATTERN keeps the keys that contain it: `fedtune config fedkseed`.
    """
    from fedtune_strategies.config import as_toml

    if write:
        write.write_text(with_run_config(write.read_text(), as_toml()))
    elif toml:
        typer.echo(as_toml(), nl=False)
    else:
        _print_config(pattern)


@app.command()
def keys(
    folder: Path,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name or address by which nodes reach the server; repeat for several."),
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="Name of a node that gets a key pair; repeat for several.")
    ] = None,
) -> None:
    """Make the certificates and node keys of a federation in FOLDER; what lies there is kept.

    The server's certificate is valid for `localhost` and every `--name`. Calling this again adds names and nodes; a
    certificate that has expired is refused, with what to do.
    """
    from deploy.certificates import node_key, server_files

    server = server_files(folder, name or [])
    typer.echo(f"server: {server.certificate}, {server.key}")
    typer.echo(f"for every node: {server.authority}")
    for one in node or []:
        pair = node_key(folder, one)
        typer.echo(f"node {one}: {pair.private} (the node alone), {pair.public} (to register)")


@app.command()
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


@app.command()
def version() -> None:
    """Show the versions that decide whether two machines can work together."""
    for name in ("fedtune", "flwr", "torch", "transformers", "grpcio"):
        typer.echo(f"{name:13}{installed_version(name)}")
    typer.echo(f"{'python':13}{sys.version.split()[0]}")


def with_run_config(project: str, table: str) -> str:
    """Replace the ``[tool.flwr.app.config]`` table in the text of a pyproject.toml.

    Raises
    ------
    ConfigError
        The text has no such table.
    """
    heading = "[tool.flwr.app.config]\n"
    before, found, after = project.partition(heading)
    if not found:
        raise ConfigError(f"no line {heading.strip()} in this file: add it where the run configuration shall stand.")
    lines = after.splitlines(keepends=True)
    rest = next((i for i, line in enumerate(lines) if line.startswith(("[", "#"))), len(lines))
    gap = "\n" if lines[rest:] else ""
    return before + heading + table + gap + "".join(lines[rest:])


def _setting(text: str) -> tuple[str, Scalar]:
    """Split ``key=value``; the value is read as TOML, and as text where it is none."""
    key, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"--set {text!r}: write it as key=value, such as --set fedkseed.lr=1e-4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _print_config(pattern: str) -> None:
    from fedtune_strategies.config import keys

    shown = [key for key in keys() if pattern in key.name]
    if not shown:
        raise ConfigError(f"no key contains {pattern!r}: `fedtune config` shows all of them.")
    console = Console(highlight=False)
    for key in shown:
        default = '""' if key.default == "" else key.default
        console.print(f"[bold]{key.name}[/bold] = {default}")
        console.print(Padding(f"{key.help} [dim]({key.accepted})[/dim]", (0, 0, 0, 4)))


def main() -> None:
    """Entry point of the ``fedtune`` command."""
    app()
