"""``fedtune serve`` and ``fedtune nodes``: an operator's server and who may take part."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.commands.output import Format, FormatOption, SetOption, console, log, setting, show
from deploy.common.paths import server_folder

nodes_app = typer.Typer(help="See who may take part; invite, approve and revoke nodes.")
FolderOption = Annotated[
    Path | None, typer.Option("--server", help="Folder of the server's state. Default: `~/.fedtune/server`.")
]
HoursOption = Annotated[float, typer.Option(min=0.01, help="Hours until a join token expires.")]


def serve(
    node: Annotated[
        list[str] | None, typer.Option(help="Name of a node to invite: prints its join token; repeat for several.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Host and port at which nodes reach this machine. Default: its own address, port 9092.")
    ] = "",
    listen: Annotated[str, typer.Option(help="Address of this machine to listen on.")] = "0.0.0.0",
    approval: Annotated[
        bool, typer.Option("--approval", help="Let each joining node wait for `fedtune nodes approve`.")
    ] = False,
    connections: Annotated[
        int, typer.Option(min=8, help="Most connections to the port; a node takes one or two, an address a quarter.")
    ] = 4096,
    hours: HoursOption = 48.0,
    status: Annotated[
        str,
        typer.Option(
            help="Where the status page and `/metrics` listen, as host:port; port 0 takes a free one. They ask "
            "for a token; beyond loopback they have TLS."
        ),
    ] = "127.0.0.1:0",
    changes: SetOption = None,
    folder: FolderOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Run the server of a federation, until Ctrl-C.

    Makes certificates, starts Flower's SuperLink with TLS and node keys, opens **one** port to others, and prints a
    join token for each `--node`. Control and runtime interface stay on loopback. What dies is started again; what is
    stopped continues where it was at the next `fedtune serve`.

    What `--set` names (`method.name`, `model.name` …) is shown to device owners before they agree; `fedtune run` says
    it again.
    """
    from deploy.common.address import own_host
    from deploy.operator.announcement import announce
    from deploy.operator.serve import serving
    from deploy.status.operator import operators_page

    folder = folder or server_folder()
    place = address if ":" in address else f"{address or own_host()}:9092"
    with (
        serving(
            folder, address=place, listen=listen, approval=approval, connections=connections, on_event=log
        ) as server,
        operators_page(folder, status) as page,
    ):
        if changes:
            announce(folder, dict(map(setting, changes)), len(node or []))
        tokens = {name: server.invite(name, hours * 3600) for name in _uninvited(server.members, node or [])}
        facts = {"address": place, "folder": str(folder), "status": page, "tokens": tokens}
        show(facts, form, lambda: _print_server(facts, hours))
        log("serving; Ctrl-C stops it")
        while True:
            server.watch()
            time.sleep(1.0)


@nodes_app.callback(invoke_without_command=True)
def nodes(context: typer.Context, folder: FolderOption = None, form: FormatOption = Format.text) -> None:
    """See who may take part: who was invited, who waits, who is online, who was revoked."""
    if context.invoked_subcommand:
        context.obj = folder
        return
    rows = list_nodes(folder or server_folder())
    show(rows, form, lambda: _print_nodes(rows))


@nodes_app.command("invite")
def invite_nodes(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Names of new nodes.")],
    hours: HoursOption = 48.0,
    form: FormatOption = Format.text,
) -> None:
    """Print a join token for each name. It works once; an earlier token of that name is void."""
    from deploy.operator.members import Members
    from deploy.operator.serve import invite, running

    control, address = running(context.obj or server_folder())
    members, authority = Members(control.folder), control.folder / "keys" / "ca.crt"
    tokens = {name: invite(members, authority, address, name, hours * 3600) for name in names}
    show(tokens, form, lambda: _print_tokens(tokens, hours))


@nodes_app.command()
def approve(context: typer.Context, name: str, form: FormatOption = Format.text) -> None:
    """Let a waiting node in. Compare the key that `fedtune nodes` shows with the one that its owner sees first."""
    from deploy.operator.members import Members
    from deploy.operator.serve import running

    control, _ = running(context.obj or server_folder())
    member = Members(control.folder).change(name, "approved", expected=("waiting", "approved"))
    line = f"{name} with key {member.fingerprint} may join: it will do so within seconds"
    show({"name": name, "state": "approved", "key": member.fingerprint}, form, lambda: console.print(line))


@nodes_app.command()
def revoke(context: typer.Context, name: str, form: FormatOption = Format.text) -> None:
    """Shut a node out: its token is void, and its key is refused from now on."""
    from deploy.operator.members import Members
    from deploy.operator.registration import revoke as revoke_member
    from deploy.operator.serve import running

    control, _ = running(context.obj or server_folder())
    revoke_member(Members(control.folder), control, name)
    show({"name": name, "state": "revoked"}, form, lambda: console.print(f"{name} is shut out"))


def list_nodes(folder: Path) -> list[dict[str, Any]]:
    """Facts of every node: what the operator decided, and what the SuperLink sees."""
    from deploy.operator.members import Members
    from deploy.operator.serve import running

    control, _ = running(folder)
    members = Members(folder).all()
    states = control.node_states() if any(member.node_id for member in members.values()) else {}
    return [
        {
            "name": member.name,
            "state": states.get(member.node_id, "offline") if member.state == "member" else member.state,
            "key": member.fingerprint,
            "node_id": member.node_id,
            "expires": member.expires if member.state == "invited" else None,
        }
        for member in members.values()
    ]


def _uninvited(members: Any, names: list[str]) -> list[str]:
    """Those who have neither joined nor an unused token: a second `serve` must not void what was given out."""
    from deploy.operator.members import GONE

    known = members.all()
    fresh = []
    for name in names:
        if (
            name in known
            and known[name].state not in GONE
            and (known[name].public_key or known[name].expires > time.time())
        ):
            hint = "" if known[name].public_key else f"; `fedtune nodes invite {name}` makes another token"
            typer.echo(f"{name}: {known[name].state} already{hint}", err=True)
        else:
            fresh.append(name)
    return fresh


def _print_server(facts: dict[str, Any], hours: float) -> None:
    console.print(f"[bold]FedTune serves at {facts['address']}[/bold]: nodes must reach it there (else: --address)")
    console.print(f"State: {facts['folder']}. Nothing else is open to other machines, unless --status is.")
    # A log is no place for a token: it stands in status.token too.
    page = facts["status"] if console.is_terminal else facts["status"].partition("#")[0]
    console.print(f"Status page: {page}", markup=False)
    if facts["tokens"]:
        _print_tokens(facts["tokens"], hours)
    console.print("\nIn another terminal: `fedtune nodes`, `fedtune run`, `fedtune status`.", markup=False)


def _print_tokens(tokens: dict[str, str], hours: float) -> None:
    until = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + hours * 3600))
    console.print(f"\nGive each owner their token, where only they read it. It works once, until {until}:")
    for name, token in tokens.items():
        console.print(f"\n[bold]{name}[/bold]")
        console.print(token, markup=False)
    # In the command itself each account of the owner's machine could read it.
    console.print("\nThey save it as token.txt and say: fedtune join token.txt --data FILE", markup=False)


def _print_nodes(rows: list[dict[str, Any]]) -> None:
    colours = {"online": "green", "offline": "yellow", "waiting": "cyan", "left": "red", "revoked": "red"}
    table = Table("name", "state", "key", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        colour = colours.get(row["state"], "default")
        until = f" until {time.strftime('%d %b %H:%M', time.localtime(row['expires']))}" if row["expires"] else ""
        table.add_row(row["name"], f"[{colour}]{row['state']}[/{colour}]{until}", row["key"])
    console.print(table if rows else "Nobody was invited yet: `fedtune nodes invite NAME`")
