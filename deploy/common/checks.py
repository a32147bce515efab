"""Checks with a tick or a cross, and what to do about a cross."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console

from fedtune_strategies.errors import FedTuneError


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    label: str
    ok: bool | None  # none where it could not be decided and need not be right
    detail: str  # what was found; with a cross, what to do
    exit_code: int = 1


def check(label: str, look: Callable[[], str | None]) -> Check:
    """Run a check: ``look`` returns what it found, None for nothing to say, or raises what is wrong."""
    try:
        found = look()
    except FedTuneError as error:
        return Check(label, False, str(error), error.exit_code)
    return Check(label, None if found is None else True, found or "not checked")


def show_checks(checks: Iterable[Check], console: Console) -> list[Check]:
    """Print checks as they come; returns those that failed."""
    marks = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[dim]-[/dim]"}
    failed = []
    for one in checks:
        console.print(marks[one.ok], f"{one.label:12}", end=" ")
        console.print(one.detail, markup=False)
        if one.ok is False:
            failed.append(one)
    return failed
