"""Who takes part in a run, as its ledger tells it."""

from __future__ import annotations

from dataclasses import dataclass

from server_app.ledger import Ledger


@dataclass(frozen=True)
class NodeStatus:
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


def node_status(ledger: Ledger) -> dict[str, NodeStatus]:
    """Return the status of every node that ever took part, by name.

    Parameters
    ----------
    ledger : Ledger
        The run's ledger.

    Returns
    -------
    dict of str to NodeStatus
        In the order of their names.
    """
    found: dict[str, NodeStatus] = {}
    # These kinds alone: a long run has many more replies, and this is asked in every attempt of every round.
    events = [record for kind in ("start", "joined", "lost") for record in ledger.records(kind)]
    for record in sorted(events, key=lambda one: one.seq):
        match record.kind:
            case "joined":
                found[record.node] = NodeStatus(True, record.time, record.body["reason"])
            case "lost":
                found[record.node] = NodeStatus(False, record.time, record.body["reason"])
            case "start":
                waiting = NodeStatus(False, record.time, "not back since the server was started again")
                found |= {name: waiting for name, one in found.items() if one.present}
    return dict(sorted(found.items()))
