"""Who takes part in a run, as its ledger tells it."""

from __future__ import annotations

from dataclasses import dataclass

from server_app.ledger import Ledger


@dataclass(frozen=True)
class NodeStatus:
    """What was last heard of a node."""

    present: bool  # whether it takes part
    since: float  # when it joined, or since when it is missing; seconds since the epoch, UTC
    reason: str  # the line that the ledger holds


class NodeStatuses:
    """The status of every node that ever took part, by name; following a run reads only what is new."""

    def __init__(self) -> None:
        self._found: dict[str, NodeStatus] = {}
        self._seen = 0

    def update(self, ledger: Ledger) -> dict[str, NodeStatus]:
        """Take up what is new in a run's ledger; returns them in the order of their names."""
        after, self._seen = self._seen, ledger.end()
        for record in ledger.records("start", "joined", "lost", after=after):
            self._seen = max(self._seen, record.seq)
            match record.kind:
                case "joined":
                    self._found[record.node] = NodeStatus(True, record.time, record.body["reason"])
                case "lost":
                    self._found[record.node] = NodeStatus(False, record.time, record.body["reason"])
                case "start":
                    waiting = NodeStatus(False, record.time, "not back since the server was started again")
                    self._found |= {name: waiting for name, one in self._found.items() if one.present}
        return dict(sorted(self._found.items()))
