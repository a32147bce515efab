"""Who takes part in a run, as its ledger tells it."""

from __future__ import annotations

from dataclasses import dataclass

from server_app.ledger import Ledger


@dataclass(frozen=True)
class Standing:
    """What was last heard of a node.

    Attributes
    ----------
    present : bool
        Whether it takes part.
    since : float
        When it joined, or since when it is missing; seconds since the epoch, UTC.
    reason : str
        The line that the ledger holds.
    """

    present: bool
    since: float
    reason: str


def standings(ledger: Ledger) -> dict[str, Standing]:
    """Return the standing of every node that ever took part, by name.

    Parameters
    ----------
    ledger : Ledger
        The run's ledger.

    Returns
    -------
    dict of str to Standing
        In the order of their names.
    """
    found: dict[str, Standing] = {}
    for record in ledger.records():
        match record.kind:
            case "joined":
                found[record.node] = Standing(True, record.time, record.body["reason"])
            case "lost":
                found[record.node] = Standing(False, record.time, record.body["reason"])
            case "start":
                waiting = Standing(False, record.time, "not back since the server was started again")
                found |= {name: waiting for name, one in found.items() if one.present}
    return dict(sorted(found.items()))
