"""``fedtune keys``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    from deploy.plumbing.certificates import node_key, server_files

    server = server_files(folder, name or [])
    typer.echo(f"server: {server.certificate}, {server.key}")
    typer.echo(f"for every node: {server.authority}")
    for one in node or []:
        pair = node_key(folder, one)
        typer.echo(f"node {one}: {pair.private} (the node alone), {pair.public} (to register)")
