"""A run as its ledger tells it: the one fold that status page, live view, trackers, model card and reports read.

Nothing is asked of the run: the ledger is read while the run writes it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune_strategies.errors import LedgerError
from server_app.ledger import Ledger, Record
from server_app.steps import Steps, read_measured, read_steps

TURNS = 60  # of the newest rounds it is kept what each node did: runs may be long and fleets large
ENDS = ("finished", "failed", "stopped")
"""Kinds of records with which a run ends, until it is started again; also its state."""


@dataclass
class Turn:
    """What one node did in one round; times are seconds since the epoch."""

    asked: float = 0.0
    replied: float = 0.0
    refused: bool = False
    acknowledged: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Round:
    """One round, of which `turns` are forgotten in time."""

    number: int
    began: float
    answered: float = 0.0  # its last reply
    committed: float = 0.0
    stopped: float = 0.0  # seconds before `answered` in which there was no server
    pause: float = 0.0  # such seconds since then
    asked: int = 0
    replies: int = 0
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    slowest: float | None = None
    fingerprints: set[str] = field(default_factory=set)
    metrics: dict[str, Any] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the round's replies."""
        return self.metrics.get("train/loss")

    @property
    def waiting(self) -> float | None:
        """Seconds until the last reply."""
        return max(0.0, self.answered - self.began - self.stopped) if self.answered else None

    @property
    def aggregation(self) -> float | None:
        """Seconds from the last reply to the commit; unknown where the server was stopped between the two."""
        return self.committed - self.answered if self.answered and self.committed and not self.pause else None


@dataclass
class NodeView:
    """What a node has brought, and how it was last heard of."""

    name: str
    last_seen: float
    event: str = ""  # kind of its newest record
    first_reply: int = 0  # round
    replies: int = 0
    refused: int = 0
    examples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    loss: float | None = None
    peak_memory: int = 0
    fingerprint: str = ""
    way: str = ""


@dataclass
class Evaluation:
    """What the model could do after a round."""

    round: int
    time: float
    loss: float | None
    perplexity: float | None
    rouge_l: float | None
    seconds: float | None
    fingerprint: str
    answers: list[dict[str, str]]


class RunView:
    """A run's ledger, folded row by row; following a run reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable = ""
        self.steps: Steps = {}
        self.measured: tuple[int, int] | None = None
        self._clear()

    def _clear(self) -> None:
        self.seq = 0
        self.updated = 0.0  # time of the newest record
        self.config: dict[str, Any] = {}
        self.begun = False
        self.loaded = False  # the server knows its base model
        self.stopped = 0.0  # seconds between a last record and the next start
        self.starts: list[dict[str, Any]] = []
        self.end: Record | None = None
        self.newest: Record | None = None  # the last round's
        self.rounds: dict[int, Round] = {}
        self.evaluations: dict[int, Evaluation] = {}
        self.nodes: dict[str, NodeView] = {}
        self.notes: list[dict[str, Any]] = []

    @classmethod
    def of(cls, folder: Path) -> RunView:
        """Read a run as far as it has got."""
        view = cls(folder)
        view.update()
        return view

    def update(self) -> bool:
        """Take up what was written since; returns whether there was anything."""
        with contextlib.closing(Ledger.read(self.folder)) as ledger:
            records = ledger.records(after=max(0, self.seq - 1))
            if self.seq and getattr(next(records, None), "time", None) != self.updated:
                # The ledger was cut back and continued differently.
                self._clear()
                records = ledger.records()
            before = self.seq, self.steps, self.measured
            for record in records:
                self._take(record)
        self.steps = self._read_steps()
        since = [start["time"] for start in self.starts[-1:]] + [one.committed for one in self.done[-1:]]
        self.measured = read_measured(self.folder, max(since)) if since and not self.end else None
        return (self.seq, self.steps, self.measured) != before

    def _read_steps(self) -> Steps:
        """How far the nodes are in the round that is open; they say so over their streams alone."""
        one = self.rounds[max(self.rounds)] if self.rounds and not self.end else None
        asked = {name: turn.asked for name, turn in one.turns.items() if not turn.replied} if one else {}
        if one is None or one.committed or not asked:
            return {}
        found = read_steps(self.folder, since=max(asked.values()))
        return {name: found[name] for name in asked if name in found}

    def follow(self) -> bool:
        """As `update`; a ledger that cannot be read is a state of this run, and no error for those beside it."""
        before = self.unreadable
        try:
            changed, self.unreadable = self.update(), ""
        except LedgerError as error:
            changed, self.unreadable = False, str(error)
        return changed or self.unreadable != before

    @property
    def done(self) -> list[Round]:
        """The rounds that are committed, in order."""
        return [one for one in self.rounds.values() if one.committed]

    def _take(self, record: Record) -> None:
        body = record.body
        match record.kind:
            case "submitted":
                self.config, self.end, self.begun = body.get("config", {}), None, False
            case "start":
                self._start(record)
            case "base":
                self.loaded = True
            case "asked":
                self._asked(record)
            case "reply":
                self._reply(record)
            case "acknowledged":
                self._turn(record).acknowledged |= body.get("kind") != "state-missing"
                self._count(record)
            case "round":
                self.newest, one = record, self._round(record)
                one.committed, one.metrics = record.time, body.get("metrics", {})
                # Who only got what its next turn needs was asked for no reply.
                one.asked -= sum(turn.acknowledged and not turn.replied for turn in one.turns.values())
                if old := self.rounds.get(record.round - TURNS):
                    old.turns = {}
            case "evaluation":
                self.evaluations[record.round] = _evaluation(record)
            case "joined" | "lost" | "refused" | "late" | "cut":
                self._note(record)
            case kind if kind in ENDS:
                self.end = record
        self.seq, self.updated = record.seq, record.time

    def _start(self, record: Record) -> None:
        self.config, self.end, self.begun = record.body.get("config", {}), None, True
        pause = record.time - self.updated if self.updated and self.starts else 0.0
        self.stopped += pause
        for one in self.rounds.values():
            if not one.committed:
                one.pause += pause
        self.starts.append({"time": record.time, **{k: v for k, v in record.body.items() if k != "config"}})

    def _round(self, record: Record) -> Round:
        return self.rounds.setdefault(record.round, Round(record.round, record.time))

    def _turn(self, record: Record) -> Turn:
        return self._round(record).turns.setdefault(record.node, Turn())

    def _asked(self, record: Record) -> None:
        one = self._round(record)
        for name in record.body["nodes"]:
            turn = one.turns.setdefault(name, Turn())
            one.asked += not turn.asked
            # After a stop the nodes that had not answered are asked once more, and their time counts from then.
            if not turn.asked or not (record.body.get("again") or turn.replied):
                turn.asked = record.time

    def _reply(self, record: Record) -> None:
        body, one, turn, node = record.body, self._round(record), self._turn(record), self._count(record)
        one.replies += not turn.replied
        one.answered = turn.replied = record.time
        one.stopped, one.pause = one.stopped + one.pause, 0.0
        one.slowest = max(one.slowest or 0.0, body.get("seconds", 0.0))
        one.fingerprints |= {body["fingerprint"]} if "fingerprint" in body else set()
        turn.facts = {key: body[key] for key in ("block", "loss") if key in body}
        node.replies += 1
        node.first_reply = node.first_reply or record.round
        node.examples = body.get("num_examples", node.examples)
        node.peak_memory = max(node.peak_memory, body.get("peak_memory", 0))
        node.loss, node.way = body.get("loss", node.loss), body.get("way", node.way)
        node.fingerprint = body.get("fingerprint", node.fingerprint)

    def _count(self, record: Record) -> NodeView:
        """Count what a task and its answer cost, or the base model: all that the record tells of."""
        node = self._node(record)
        for counter in (node, self._round(record)) if record.round else (node,):
            counter.bytes_up += record.body.get("bytes_up", 0)
            counter.bytes_down += record.body.get("bytes_down", 0)
        node.seconds += record.body.get("seconds", 0.0)
        return node

    def _node(self, record: Record) -> NodeView:
        node = self.nodes.setdefault(record.node, NodeView(record.node, record.time))
        node.event = record.kind
        if record.kind != "lost":
            node.last_seen = record.time
        return node

    def _note(self, record: Record) -> None:
        if record.node:
            node = self._count(record)
            if record.kind == "refused":
                node.refused += 1
                if record.round:
                    one, turn = self._round(record), self._turn(record)
                    one.refused += not turn.refused
                    turn.refused = True
        if record.kind != "joined":
            facts = {"time": record.time, "kind": record.kind, "round": record.round, "node": record.node}
            self.notes.append(facts | {"reason": record.body.get("reason", "")})


def _evaluation(record: Record) -> Evaluation:
    body = record.body
    return Evaluation(
        round=record.round,
        time=record.time,
        loss=body.get("eval/loss"),
        perplexity=body.get("eval/perplexity"),
        rouge_l=body.get("eval/rougeL"),
        seconds=body.get("seconds"),
        fingerprint=body.get("fingerprint", ""),
        answers=body.get("answers", []),
    )
