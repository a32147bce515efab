"""Drive a strategy over a fleet, round by round, from its ledger.

A round is: ask, accept reply by reply (each one appended to the ledger at once), aggregate, append the new state.
A server that was stopped in the middle of a round takes it up from its records, and asks only the nodes that have
neither answered nor failed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from torch import Tensor

from fedtune_strategies.admission import Node
from fedtune_strategies.config import Config
from fedtune_strategies.errors import DivergenceError, FedTuneError, NodesError, ProtocolError
from fedtune_strategies.fleet import Fleet, NodeReply
from fedtune_strategies.logs import about
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.door import refusing
from fedtune_strategies.protocol.records import from_record, to_record
from fedtune_strategies.strategy import TuningStrategy, settings_of
from fedtune_strategies.words import counted
from server_app.guard import Guard
from server_app.ledger import Ledger, Record
from server_app.node_status import NodeStatuses
from server_app.progress import Progress, round_records

log = logging.getLogger("fedtune")

AHEAD = 60.0  # least seconds for a node that only fetches ahead, once all that counts in a round is there


@dataclass(frozen=True)
class Run:
    """What every round of a run works with."""

    strategy: TuningStrategy  # a new strategy; it takes up the ledger's state
    fleet: Fleet
    ledger: Ledger
    config: Config
    statuses: NodeStatuses = field(default_factory=NodeStatuses)  # who takes part, as far as the ledger has been read


class _Finished(Exception):  # noqa: N818
    """The evaluation of a round says that the run is finished, while the next one has begun."""


def run_rounds(
    run: Run, place: Callable[[int, ArrayRecord], None], evaluate: Callable[[], None], guard: Guard
) -> tuple[int, str]:
    """Run all rounds that the ledger does not hold yet; returns the last one, and why the run ended early.

    A round is evaluated while the nodes work on the next one, unless the ledger has that already. `place` is called
    with (round, arrays) before the first round and after every round; it puts the weights in place, which also gives
    the strategy the fingerprint that it expects of the nodes. `guard` is asked after every evaluation whether to
    continue.
    """
    last = run.config.num_server_rounds
    done, arrays = restore(run.strategy, run.ledger)
    if done:
        log.info("resuming after round %d of %d", done, last)
    run.strategy.summary()
    place(done, arrays)

    def meanwhile() -> None:
        evaluate()
        if guard.look():
            raise _Finished

    with contextlib.suppress(_Finished):
        while done < last and not guard.look():
            with about(round=done + 1):
                arrays = _Round(run, done + 1, arrays, meanwhile).to_its_end()
            done += 1
            place(done, arrays)
        evaluate()
    return done, guard.look()


def restore(strategy: TuningStrategy, ledger: Ledger, round: int | None = None) -> tuple[int, ArrayRecord]:
    """Fold the ledger, up to a round, into a strategy; returns the round (0: the base model) and the global model."""
    files: dict[str, str] = {}
    newest: Record | None = None
    for record in ledger.records("round"):
        if round is not None and record.round > round:
            break
        files |= record.body["files"]
        newest = record

    if newest is None:
        return 0, strategy.initial_arrays()
    return newest.round, strategy.restore(safetensors.torch.load(ledger.payload(newest)), _loader(ledger, files))


def _loader(ledger: Ledger, files: dict[str, str]) -> Callable[[str], dict[str, Tensor] | None]:
    return lambda label: ledger.get_file(files[label]) if label in files else None


def as_messages(replies: list[Record], ledger: Ledger) -> Iterator[Message]:
    """Turn recorded replies into the messages that they were, each read when its turn comes."""
    for record in replies:
        content = to_record(record.body["kind"], ledger.payload(record))
        yield Message(content, dst_node_id=0, message_type=MessageType.TRAIN)


class _Round:
    """One round: asks, takes what comes, and commits."""

    def __init__(self, run: Run, number: int, arrays: ArrayRecord, meanwhile: Callable[[], None]) -> None:
        self.strategy, self.fleet, self.ledger, self.config = run.strategy, run.fleet, run.ledger, run.config
        self.statuses, self.number, self.arrays, self.meanwhile = run.statuses, number, arrays, meanwhile
        self.progress = Progress()
        self.used: dict[str, Any] = dict(settings_of(run.config, number))

    def to_its_end(self) -> ArrayRecord:
        """Ask until enough replies count; return the model that they make."""
        self._take_up()
        # A server that was stopped in the round continues with the nodes that it had asked; it asks nobody where the
        # round was complete.
        while not self.progress.asked or self.progress.open or self._lacks_replies():
            if not self.progress.open and self.progress.attempt == self.config.round.attempts:
                raise self._too_few()
            self._attempt()
        self.meanwhile()  # where nobody was asked
        return self._commit(list(self.ledger.records("reply", round=self.number)))

    def _take_up(self) -> None:
        """Fold what the ledger holds of the round into its strategy, which then stands where the server left it."""
        for record in round_records(self.ledger, self.number):
            self.progress.take(record)
            if record.kind == "asked":
                self._ask_again_as(record)
            elif record.kind in ("reply", "acknowledged"):
                accept = self.strategy.accept_late if record.body["late"] else self.strategy.accept
                message = protocol.decode(record.body["kind"], self.ledger.payload(record))
                # A reply that is late by a round was checked against what only the server knew that had asked for it.
                with contextlib.suppress(FedTuneError):
                    accept(self.number, message)

    def _ask_again_as(self, record: Record) -> None:
        """Let the strategy make the tasks that it made then, with the settings of then; they are not sent."""
        self.used = record.body["used"]
        asked = record.body["nodes"]
        there = sorted([*asked.items(), *((name, 1) for name in record.body["idle"])])
        present = [Node(name, place, count) for place, (name, count) in enumerate(there)]
        list(self._tasks(Fleet(self.fleet, "", nodes=present)))
        if not record.body["again"]:
            self.strategy.note_asked(asked)

    def _attempt(self) -> None:
        """Ask once, and take what comes until all have answered or the deadline."""
        self.fleet.exclude(())
        self._wait_for_nodes()
        self._take_late()
        interrupted = set(self.progress.open)  # asked by a server that was stopped: the same attempt continues
        attempt = self.progress.attempt + (not interrupted)
        self._exclude(attempt)
        self._log_missing()
        restarted = self._ask(attempt, interrupted)
        if restarted:
            # Restarted nodes take part in this round too: the strategy now sends them all they need.
            self._ask(attempt, restarted, again=True)
        self.progress.close()
        if self._lacks_replies():
            log.warning(
                "round %d, attempt %d of %d: %d usable replies, %d needed",
                self.number, attempt, self.config.round.attempts,
                len(self.progress.answered), self.config.strategy.min_replies,
            )  # fmt: skip

    def _wait_for_nodes(self) -> None:
        # The first round waits for those who were there when the run was started: who joins first must not decide it.
        is_first = self.number == 1 and not self.progress.asked
        hoped = self.config.round.first_nodes if is_first else 0
        self.fleet.wait_for_nodes(self.config.strategy.min_nodes, self.config.round.node_wait, hoped)

    def _exclude(self, attempt: int) -> None:
        """Leave out who has answered; from the second attempt on also who failed, where others are there."""
        progress = self.progress
        # Whose late reply counts in this round is not asked in it.
        self.fleet.exclude(progress.answered - progress.asked if attempt == 1 else progress.answered)
        if attempt > 1 and set(self.fleet.nodes) - progress.failed:
            self.fleet.exclude(progress.answered | progress.failed)

    def _ask(self, attempt: int, only: set[str], *, again: bool = False) -> set[str]:
        """Send tasks, where some nodes are named to these alone, and record what comes; returns who lacks its state."""
        nodes = {node.id: node for node in self.fleet.nodes.values()}
        tasks = [(nodes[task.metadata.dst_node_id], task) for task in self._tasks(self.fleet)]
        tasks = [(node, task) for node, task in tasks if not only or node.name in only]
        asked = {node.name: node.num_examples for node, _ in tasks}
        idle = sorted({node.name for node in nodes.values()} - asked.keys())
        # On record before anything is sent: a server that is stopped now asks the same nodes again.
        facts = {"nodes": asked, "idle": idle, "attempt": attempt, "again": again, "used": self.used}
        self._note("asked", body=facts)
        if not again:
            self.strategy.note_asked(asked)
        missing_state = self._exchange([task for _, task in tasks])
        self._take_late()
        for name in sorted((self.progress.open & asked.keys()) - missing_state):
            log.warning("round %d: no usable reply from %s", self.number, name, extra={"node": name})
        return missing_state

    def _tasks(self, fleet: Fleet) -> Iterable[Message]:
        return self.strategy.configure_train(self.number, self.arrays, ConfigRecord(self.used), fleet)

    def _exchange(self, tasks: list[Message]) -> set[str]:
        """Send tasks and record the answers as they come; returns who lacks its state."""
        missing_state: set[str] = set()
        limits = self.config.round
        patience = limits.deadline if self.strategy.takes_late else 0.0
        start = time.monotonic()
        for replies in self.fleet.exchange(tasks, limits.deadline, patience, self.meanwhile):
            with self.ledger.together():
                for received in replies:
                    self._take(received)
            missing_state |= {one.node.name for one in replies if isinstance(one.message, protocol.StateMissing)}
            if limits.grace and not self._lacks_replies():
                self.fleet.shorten_deadline(limits.grace)
            if self.strategy.settled(self.progress.answered):
                # Who only fetches ahead has as long again as the round took so far, and a while.
                self.fleet.shorten_deadline(time.monotonic() - start + AHEAD)
        return missing_state

    def _take(self, received: NodeReply) -> None:
        """Record one answer: accepted, or refused with the reason."""
        name = received.node.name
        try:
            kind, facts, payload = _accept(self.number, received, self.strategy.accept)
        except FedTuneError as error:
            log.warning("round %d: %s: %s", self.number, name, error, extra={"node": name})
            self._note("refused", name, {"reason": str(error), "exit_code": error.exit_code} | _traffic(received))
        else:
            self._note(kind, name, facts, payload)

    def _take_late(self) -> None:
        """Let replies to earlier rounds count in this one, where the strategy wants them."""
        for received in self.fleet.late():
            name = received.node.name
            try:
                self._check_counts_once(received)
                kind, facts, payload = _accept(self.number, received, self.strategy.accept_late, late=True)
            except FedTuneError as error:
                log.warning("round %d: %s answered late: %s", self.number, name, error, extra={"node": name})
                self._note("late", name, {"reason": str(error)} | _traffic(received))
            else:
                self._note(kind, name, facts, payload)

    def _check_counts_once(self, late: NodeReply) -> None:
        round = getattr(late.message, "round", self.number)
        before = {record.node for record in self.ledger.records("reply", round=round)}
        if late.node.name in self.progress.answered | before:
            raise ProtocolError("it has answered for this round already: the reply is left out.")

    def _note(self, kind: str, node: str = "", body: dict[str, Any] | None = None, payload: bytes = b"") -> None:
        """Append a record of this round, and take it up as a restarted server would."""
        self.progress.take(self.ledger.append(kind, round=self.number, node=node, body=body, blob=payload))

    def _lacks_replies(self) -> bool:
        return len(self.progress.answered) < self.config.strategy.min_replies

    def _log_missing(self) -> None:
        missing = [
            f"{name} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one.since))} ({one.reason})"
            for name, one in self.statuses.update(self.ledger).items()
            if not one.present
        ]
        if missing:
            log.warning("round %d: missing: %s", self.number, ", ".join(missing))

    def _commit(self, replies: list[Record]) -> ArrayRecord:
        arrays, metrics = self.strategy.aggregate_train(self.number, as_messages(replies, self.ledger))
        if arrays is None:
            told = counted(len(replies), "reply", "replies")
            raise NodesError(f"round {self.number}: the strategy made no model of {told}.")
        state = self.strategy.state()
        facts: dict[str, Any] = {
            "files": {label: self.ledger.put_file(tensors) for label, tensors in state.files.items()},
            "metrics": dict(metrics or {}),
            "used": self.used | self.strategy.used(),
            "replies": [record.node for record in replies],
        }
        self.ledger.append("round", round=self.number, body=facts, blob=safetensors.torch.save(state.tensors))
        self.strategy.stored(_loader(self.ledger, facts["files"]))
        if self.config.run.prune:
            self.ledger.forget_replies()
        log.info("round %d: %d replies, %s", self.number, len(replies), _brief(facts["metrics"]))
        return arrays

    def _too_few(self) -> FedTuneError:
        refused = list(self.ledger.records("refused", round=self.number))
        reasons = dict.fromkeys(f"{record.node}: {record.body['reason']}" for record in refused)
        line = f"round {self.number} had too few usable replies in {self.config.round.attempts} attempts: "
        line += "; ".join(reasons) or "no node answered by the deadline"
        if {record.body["exit_code"] for record in refused} == {DivergenceError.exit_code}:
            return DivergenceError(f"the run diverges: {line}. Start another one with a lower 'train.lr'.")
        return NodesError(f"{line}. Start the run again to continue from round {self.number - 1}.")


def _accept(
    number: int, received: NodeReply, check: Callable[[int, protocol.Message], bool], late: bool = False
) -> tuple[str, dict[str, Any], bytes]:
    """Let the strategy check an answer; return what the ledger records of it: kind, facts, payload."""
    message = received.message
    if isinstance(message, FedTuneError):
        raise message
    sender = getattr(message, "node", None)
    if sender != received.node.name:
        raise ProtocolError(f"the reply bears the name of {sender!r}: it is left out.")
    with refusing():
        counts = check(number, message)
    assert received.content is not None
    _, payload = from_record(received.content)
    facts: dict[str, Any] = {
        key: value for key, value in vars(message).items() if isinstance(value, str | int | float) and key != "node"
    }
    facts |= {"kind": message.kind, "late": late} | _traffic(received)
    facts["way"] = "stream" if received.streamed else "flower"
    return "reply" if counts else "acknowledged", facts, payload


def _traffic(received: NodeReply) -> dict[str, int]:
    return {"bytes_down": received.bytes_down, "bytes_up": received.bytes_up}


def _brief(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )
