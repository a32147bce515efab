"""How far a round has come: a fold over its records, the same for a server that was restarted in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from server_app.ledger import Ledger, Record


@dataclass
class Progress:
    """An open round."""

    attempt: int = 0  # the attempt that is going on, from 1; 0 before the first
    open: set[str] = field(default_factory=set)  # who was asked in it and has neither answered nor failed
    answered: set[str] = field(default_factory=set)  # whose reply counts in the round
    failed: set[str] = field(default_factory=set)  # who was asked and gave nothing usable
    asked: set[str] = field(default_factory=set)  # who was asked in the round at all
    _acknowledged: set[str] = field(default_factory=set)

    def take(self, record: Record) -> None:
        """Take up one record."""
        match record.kind:
            case "asked":
                if record.body["attempt"] != self.attempt:
                    self.close()
                self.attempt = record.body["attempt"]
                self.asked |= set(record.body["nodes"])
                self.open |= set(record.body["nodes"]) - self.answered
                self._acknowledged -= set(record.body["nodes"])
            case "reply":
                self.answered.add(record.node)
                self.open.discard(record.node)
            case "acknowledged" if record.body["kind"] != "state-missing":
                self._acknowledged.add(record.node)
            case "refused" | "lost" if record.node in self.open:
                self.open.discard(record.node)
                self.failed.add(record.node)
            case "failed":  # the run ended: it is started again with all its attempts
                self.attempt = min(self.attempt, 1) if self.open else 0
                self.failed.clear()

    def close(self) -> None:
        """End the attempt: who has not answered by now has failed, but for those of whom no reply was asked."""
        self.failed |= self.open - self._acknowledged
        self.open = set()


def round_records(ledger: Ledger, round: int) -> Iterator[Record]:
    """Yield what a round that is not committed has come to, with the events of the time since it began."""
    first = next(ledger.records("asked", "reply", round=round), None)
    kinds = ("asked", "reply", "acknowledged", "refused", "lost", "failed")
    for record in ledger.records(*kinds, after=first.seq - 1) if first else ():
        if record.round in (0, round):
            yield record
