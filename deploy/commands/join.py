"""``fedtune join`` and ``fedtune leave``: a device owner's node."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.agreement import agree_to_waiting, ask_about, invite
from deploy.commands.output import (
    ColumnsOption,
    Format,
    FormatOption,
    NodeSetOption,
    TokenArgument,
    agree,
    console,
    log,
    node_changes,
    read_token,
    show,
    words,
)
from fedtune_strategies.errors import ConfigError

NameOption = Annotated[str | None, typer.Option("--name", help="Which federation, where this machine joined several.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Say yes without being asked.")]


def join(
    token: TokenArgument = "",
    data: Annotated[
        Path | None, typer.Option(help="Your data: JSONL, JSON, CSV, Parquet, or a `datasets` folder.")
    ] = None,
    data_format: Annotated[
        str, typer.Option("--data-format", help="Format of the data, where it is not plain.")
    ] = "auto",
    columns: ColumnsOption = "",
    model: Annotated[
        str,
        typer.Option(help="Folder of the base model, or `server` to get it from there."),
    ] = "",
    device: Annotated[str, typer.Option(help="Where the model runs: `cpu`, `cuda`, `cuda:1`. Default: `cpu`.")] = "",
    changes: NodeSetOption = None,
    name: NameOption = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", "-y", help="Agree without being asked, and to every run that asks while this runs."),
    ] = False,
    to_waiting: Annotated[
        bool,
        typer.Option("--agree", help="Show the run that waits for you, ask, and end; the node that runs takes it up."),
    ] = False,
    metrics: Annotated[
        str, typer.Option(help="Where this node's `/metrics` and `/healthz` listen, as host:port. Default: nowhere.")
    ] = "",
    install_service: Annotated[
        bool, typer.Option("--install-service", help="Run as a systemd service of yours instead of in this terminal.")
    ] = False,
    form: FormatOption = Format.text,
) -> None:
    """Join a federation with the token that its operator gave you, and take part until Ctrl-C.

    Without TOKEN, start the node of a federation that this machine has joined.

    Checks the server against the token, reads your data, shows what will be tuned, what it takes of this machine and
    **exactly what leaves it**, and asks once. Then it runs Flower's SuperNode, and reconnects for ever.

    A run that asks for more than you agreed to is refused, and you are asked; a service waits for
    `fedtune join --agree`.

    Next time `fedtune join` alone is enough. `fedtune leave` gives the membership back.
    """
    from deploy.common.processes import told_on_ctrl_c
    from deploy.monitoring.node import node_page
    from deploy.owner.join import find_membership
    from deploy.owner.node import run_node

    if not token:
        membership = find_membership(name)
        if data or columns or model or device or changes or data_format != "auto":
            raise ConfigError(
                f"{membership.name} starts as it joined: leave out --data, --data-format, --columns, --model, --device "
                "and --set, or `fedtune leave` and join again"
            )
        if to_waiting:
            agree_to_waiting(membership, yes, form)
            show(_facts(membership), form, lambda: console.print("Agreed."))
            return
    else:
        if data is None:
            raise ConfigError("--data is missing: name the file with your examples, such as --data ~/notes.jsonl")
        word = read_token(token)
        node = {"data": str(data.expanduser().resolve()), "format": data_format, "model": model, "device": device}
        membership = _join(word, {**node, "settings": node_changes(columns, changes)}, yes, form)
    show(_facts(membership), form, lambda: None)
    if install_service:
        from deploy.owner.service import install

        for line in install(membership):
            words(form).print(line, markup=False)
        return
    log(f"{membership.name} takes part at {membership.address}; Ctrl-C pauses it, `fedtune leave` ends it")
    paused = "paused: you are still a member; `fedtune join` takes part again, `fedtune leave` ends it"
    with told_on_ctrl_c(paused), node_page(membership.folder, metrics):
        run_node(membership, log, lambda run: ask_about(membership, run, yes, form))


def leave(
    name: NameOption = None,
    yes: YesOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Forget the membership here even if the server cannot be reached.")
    ] = False,
    form: FormatOption = Format.text,
) -> None:
    """Leave a federation: the server forgets this node's key, and this machine the federation. Your data stay.

    A node that runs here ends by itself.
    """
    from deploy.owner.join import find_membership, unregister
    from deploy.owner.service import remove

    membership = find_membership(name)
    told = f"Leaving {membership.address} as {membership.name} removes {membership.folder}. Your data stay."
    words(form).print(told, markup=False)
    if not yes:
        agree("Leave?", form)
    remove(membership)
    record = unregister(membership, tell_server=not force)
    kept = f" What left this machine is on record in {record}" if record else ""
    show({**_facts(membership), "record": record}, form, lambda: console.print(f"Left.{kept}", markup=False))


def _facts(membership: Any) -> dict[str, Any]:
    return {**asdict(membership), "folder": membership.folder}


def _join(word: str, node: dict[str, Any], yes: bool, form: Format) -> Any:
    from deploy.common.join_token import decode_token
    from deploy.flower.versions import check_reaches
    from deploy.owner.join import Membership, fetch_server_info, is_redeemed, register
    from fedtune_strategies.protocol.door import clean

    token = decode_token(word)
    membership = Membership(token.name, token.address, **node)
    if is_redeemed(membership, token):
        raise ConfigError(
            f"this machine is {membership.folder.name} already: `fedtune join` starts it, `fedtune leave` ends it"
        )
    token.check_time()
    authority, server = fetch_server_info(token)
    check_reaches(clean(str(server["flwr"]), 20))
    agreement = invite(membership, server["offer"], yes, form)
    register(
        token,
        authority,
        membership,
        lambda key: log(f"waiting for the operator to approve this node; tell them its key: {key}"),
    )
    if agreement is not None:
        membership.history.agree(agreement)
    return membership
