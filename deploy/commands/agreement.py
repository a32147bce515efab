"""How a device owner is asked to agree to a run: when joining, while the node runs, or by ``fedtune join --agree``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from deploy.commands.output import Format, agree, log, words
from fedtune_strategies.errors import ConfigError, FedTuneError


def invite(membership: Any, offer: Mapping[str, Any], yes: bool, form: Format) -> Any:
    """Show what an owner who joins agrees to, and ask; returns the agreement, None where none is to be kept."""
    from deploy.owner.consent import ALWAYS, NOTHING_ANNOUNCED, by_hand, propose
    from deploy.owner.data import read_data

    settings = offer.get("settings") or {}
    out, (examples, usable) = words(form), read_data(membership.node_config(), _model_here(membership, settings))
    out.print(f"[bold]You are invited[/bold] to {escape(membership.address)} as [bold]{membership.name}[/bold].\n")
    _rows([("your data", f"{membership.data}: {usable}")], out)
    agreement = None
    if membership.has_own_terms():
        out.print("\nThe terms that you have set, on which any run is answered:", markup=False)
        rows, lines = by_hand(membership.node_config().terms)
        _rows(rows, out)
        _leaves(lines, out)
    elif settings:
        try:
            proposal = propose(settings, membership, examples, offer.get("plan"))
        except FedTuneError as error:
            out.print(f"\nThe run there cannot be agreed to here: {error}", markup=False)
        else:
            _show(proposal, out)
            agreement = proposal.agreement
    else:
        out.print(f"\n{NOTHING_ANNOUNCED}", markup=False)
        _leaves(ALWAYS, out)
    if not yes:
        agree("\nDo you agree?", form)
    return agreement


def ask_about(membership: Any, run: Mapping[str, Any], yes: bool, form: Format) -> None:
    """Tell of a run that was refused while the node runs: agree to it, ask, or say how to agree."""
    reasons = "; ".join(run["reasons"])
    if not (yes or sys.stdin.isatty()):
        log(f"waits for you, {reasons}: `fedtune join --agree` shows it and asks you")
        return
    try:
        proposal = _proposal(membership, run)
    except FedTuneError as error:
        log(f"a run was refused, {reasons}; it cannot be agreed to here: {error}")
        return
    log(f"a run asks for more than you agreed to: {reasons}")
    _show(proposal, words(form))
    if yes or typer.confirm("\nDo you agree?", err=form is Format.json):
        membership.history.agree(proposal.agreement)
        log("agreed, as --yes says" if yes else "agreed")
    else:
        log("not agreed: this node stays away from that run")


def agree_to_waiting(membership: Any, yes: bool, form: Format) -> None:
    """Show the run that waits for its owner, and ask."""
    run = membership.history.waiting()
    if run is None:
        raise ConfigError(f"no run waits for your agreement at {membership.address}")
    reasons = "; ".join(run["reasons"])
    words(form).print(f"{membership.address} asks for more than you agreed to: {reasons}", markup=False)
    proposal = _proposal(membership, run)
    _show(proposal, words(form))
    if not yes:
        agree("\nDo you agree?", form)
    membership.history.agree(proposal.agreement)


def _proposal(membership: Any, run: Mapping[str, Any]) -> Any:
    from deploy.owner.consent import propose
    from deploy.owner.data import read_data

    if not run["config"]:
        raise ConfigError("its settings are too long to be shown: ask the operator")
    return propose(run["config"], membership, read_data(membership.node_config())[0])


def _show(proposal: Any, out: Console) -> None:
    from deploy.owner.consent import BOUND

    _rows(proposal.rows, out)
    _leaves(proposal.leaves, out)
    out.print(f"\n{BOUND}")


def _leaves(lines: Sequence[str], out: Console) -> None:
    from deploy.owner.consent import NEVER

    out.print(f"\n{NEVER}")
    for line in lines:
        out.print(f"  • {line}", markup=False)


def _rows(rows: list[tuple[str, str]], out: Console) -> None:
    for label, text in rows:
        out.print(f"  {label:12}{text}", markup=False)


def _model_here(membership: Any, settings: Mapping[str, Any]) -> str:
    """The base model that the owner named, else the run's; empty where the server gives it."""
    named = membership.model or str(settings.get("model.name", ""))
    return "" if named == "server" else named
