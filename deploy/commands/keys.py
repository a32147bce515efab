"""``fedtune keys``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.output import Format, FormatOption, show


def keys(
    folder: Path,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name or address by which nodes reach the server; repeat for several."),
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="Name of a node that gets a key pair; repeat for several.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Make the certificates and node keys of a federation in FOLDER; what is there is kept.

    The server's certificate is valid for `localhost` and every `--name`. Calling this again adds names and nodes; a
    certificate that has expired is refused, with what to do.
    """
    from deploy.common.certificates import node_key, server_files

    server = server_files(folder, name or [])
    pairs = {one: node_key(folder, one) for one in node or []}
    facts = {
        "server": {"certificate": server.certificate, "key": server.key},
        "authority": server.authority,
        "nodes": {one: {"private": pair.private, "public": pair.public} for one, pair in pairs.items()},
    }

    def as_text() -> None:
        typer.echo(f"server: {server.certificate}, {server.key}")
        typer.echo(f"for every node: {server.authority}")
        for one, pair in pairs.items():
            typer.echo(f"node {one}: {pair.private} (the node alone), {pair.public} (to register)")

    show(facts, form, as_text)
