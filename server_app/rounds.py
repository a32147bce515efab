"""Drive a strategy over a fleet, round by round, from its ledger.

A round is: ask, accept reply by reply (each one appended to the ledger at once), aggregate, append the new state.
A server that was stopped in the middle of a round takes it up from its records, and asks only the nodes that have
neither answered nor failed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
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
from fedtune_strategies.strategy import TuningStrategy
from fedtune_strategies.words import counted
from server_app.guard import Guard
from server_app.ledger import Ledger, Record
from server_app.node_status import NodeStatus, NodeStatuses
from server_app.progress import Progress, round_records

log = logging.getLogger("fedtune")


class _Finished(Exception):  # noqa: N818
    """The evaluation of a round says that the run is finished, while the next one has begun."""


def run_rounds(
    strategy: TuningStrategy,
    fleet: Fleet,
    ledger: Ledger,
    config: Config,
    place: Callable[[int, ArrayRecord], None],
    evaluate: Callable[[], None],
    guard: Guard,
) -> tuple[int, str]:
    """Run all rounds that the ledger does not hold yet.

    A round is evaluated while the nodes work on the next one.

    Parameters
    ----------
    strategy : TuningStrategy
        A new strategy; it takes up the ledger's state.
    fleet : Fleet
        The nodes.
    ledger : Ledger
        Open for writing.
    config : Config
        The run configuration.
    place : callable
        Called with (round, arrays) before the first round and after every round; it puts the weights in place,
        which also gives the strategy the fingerprint that it expects of the nodes.
    evaluate : callable
        Evaluates the weights that are in place, unless the ledger has that already.
    guard : Guard
        Asked after every evaluation whether to continue.

    Returns
    -------
    tuple of int and str
        The last round, and why the run ended before all rounds were done; empty where it did not.

    Raises
    ------
    DivergenceError
        Tuning makes the model worse.
    NodesError
        Too few nodes, or too few usable replies in all attempts of a round. The ledger keeps what was committed.
    """
    done, arrays = restore(strategy, ledger)
    statuses = NodeStatuses()
    if done:
        log.info("resuming after round %d of %d", done, config.num_server_rounds)
    strategy.summary()
    place(done, arrays)

    def meanwhile() -> None:
        evaluate()
        if guard.look():
            raise _Finished

    with contextlib.suppress(_Finished):
        while done < config.num_server_rounds and not guard.look():
            with about(round=done + 1):
                arrays = _round(done + 1, strategy, arrays, fleet, ledger, config, statuses, meanwhile)
            done += 1
            place(done, arrays)
        evaluate()
    return done, guard.look()


def restore(strategy: TuningStrategy, ledger: Ledger, round: int | None = None) -> tuple[int, ArrayRecord]:
    """Fold the ledger into a strategy.

    Parameters
    ----------
    strategy : TuningStrategy
        A new strategy.
    ledger : Ledger
        The run's ledger.
    round : int, optional
        Stop after this round; the last committed one by default.

    Returns
    -------
    tuple of int and ArrayRecord
        The round and the global model after it; round 0 is the base model.

    Raises
    ------
    LedgerError
        A stored file is missing or damaged.
    """
    files: dict[str, str] = {}
    newest: Record | None = None
    for record in ledger.records("round"):
        if round is not None and record.round > round:
            break
        files |= record.body["files"]
        newest = record

    def load(label: str) -> dict[str, Tensor] | None:
        return ledger.get_file(files[label]) if label in files else None

    if newest is None:
        done, arrays = 0, strategy.initial_arrays()
    else:
        done, arrays = newest.round, strategy.restore(safetensors.torch.load(ledger.payload(newest)), load)
    return done, arrays


def as_messages(replies: list[Record], ledger: Ledger) -> list[Message]:
    """Turn recorded replies into the messages that they were."""
    return [
        Message(to_record(record.body["kind"], ledger.payload(record)), dst_node_id=0, message_type=MessageType.TRAIN)
        for record in replies
    ]


def _round(
    number: int,
    strategy: TuningStrategy,
    arrays: ArrayRecord,
    fleet: Fleet,
    ledger: Ledger,
    config: Config,
    statuses: NodeStatuses,
    meanwhile: Callable[[], None],
) -> ArrayRecord:
    settings, progress = config.strategy, _take_up(number, strategy, arrays, fleet, ledger)
    # A server that was stopped in the round continues with the nodes that it had asked; it asks nobody where the round
    # was complete.
    while not progress.asked or progress.open or len(progress.answered) < settings.min_replies:
        if not progress.open and progress.attempt == config.round.attempts:
            raise _too_few(number, ledger, config.round.attempts)
        fleet.exclude(())
        # The first round waits for those who were there when the run was started: who joins first must not decide it.
        hoped = config.round.first_nodes if number == 1 and not progress.asked else 0
        fleet.wait_for_nodes(settings.min_nodes, config.round.node_wait, hoped)
        _take_late(number, strategy, fleet, ledger, progress)
        only = progress.open or None
        attempt = progress.attempt if only else progress.attempt + 1
        # Whose late reply counts in this round is not asked in it.
        fleet.exclude(progress.answered - progress.asked if attempt == 1 else progress.answered)
        _log_missing(number, statuses.update(ledger))
        if attempt > 1 and set(fleet.nodes) - progress.failed:
            fleet.exclude(progress.answered | progress.failed)
        _ask(number, strategy, arrays, fleet, ledger, config, progress, attempt, only, meanwhile)
        progress.close()
        if len(progress.answered) < settings.min_replies:
            log.warning(
                "round %d, attempt %d of %d: %d usable replies, %d needed",
                number, attempt, config.round.attempts, len(progress.answered), settings.min_replies,
            )  # fmt: skip
    meanwhile()  # where nobody was asked
    return _commit(number, strategy, list(ledger.records("reply", round=number)), ledger)


def _take_up(number: int, strategy: TuningStrategy, arrays: ArrayRecord, fleet: Fleet, ledger: Ledger) -> Progress:
    """Fold what the ledger holds of a round into its strategy, which then stands where the server left it."""
    progress = Progress()
    for record in round_records(ledger, number):
        progress.take(record)
        if record.kind == "asked":
            names = record.body["nodes"]
            there = [*names.items(), *((name, 1) for name in record.body["idle"])]
            present = [Node(name, place, count) for place, (name, count) in enumerate(sorted(there))]
            list(strategy.configure_train(number, arrays, ConfigRecord(), Fleet(fleet, "", nodes=present)))
            if not record.body["again"]:
                strategy.note_asked(names)
        elif record.kind in ("reply", "acknowledged"):
            message = protocol.decode(record.body["kind"], ledger.payload(record))
            # A reply that is late by a round was checked against what only the server knew that had asked for it.
            with contextlib.suppress(FedTuneError):
                (strategy.accept_late if record.body["late"] else strategy.accept)(number, message)
    return progress


def _ask(
    number: int,
    strategy: TuningStrategy,
    arrays: ArrayRecord,
    fleet: Fleet,
    ledger: Ledger,
    config: Config,
    progress: Progress,
    attempt: int,
    only: set[str] | None,
    meanwhile: Callable[[], None],
    *,
    again: bool = False,
) -> None:
    """Send the round's tasks, to some nodes only where these are named, and record what comes."""
    nodes = {node.id: node for node in fleet.nodes.values()}
    tasks = list(strategy.configure_train(number, arrays, ConfigRecord(), fleet))
    if only is not None:
        tasks = [task for task in tasks if nodes[task.metadata.dst_node_id].name in only]
    asked = {node.name: node.num_examples for node in (nodes[task.metadata.dst_node_id] for task in tasks)}
    idle = sorted({node.name for node in nodes.values()} - asked.keys())
    facts: dict[str, Any] = {"nodes": asked, "idle": idle, "attempt": attempt, "again": again}
    progress.take(ledger.append("asked", round=number, body=facts))
    if not again:
        strategy.note_asked(asked)
    missing_state: set[str] = set()
    patience = config.round.deadline if strategy.takes_late else 0.0
    for replies in fleet.exchange(tasks, config.round.deadline, patience, meanwhile):
        with ledger.together():
            for received in replies:
                _take(number, received, strategy, ledger, progress)
        missing_state |= {one.node.name for one in replies if isinstance(one.message, protocol.StateMissing)}
        if config.round.grace and len(progress.answered) >= config.strategy.min_replies:
            fleet.shorten_deadline(config.round.grace)
    _take_late(number, strategy, fleet, ledger, progress)
    for name in sorted((progress.open & asked.keys()) - missing_state):
        log.warning("round %d: no usable reply from %s", number, name, extra={"node": name})
    if missing_state and not again:
        # Restarted nodes take part in this round too: the strategy now sends them all they need.
        _ask(number, strategy, arrays, fleet, ledger, config, progress, attempt, missing_state, meanwhile, again=True)


def _take(number: int, received: NodeReply, strategy: TuningStrategy, ledger: Ledger, progress: Progress) -> None:
    """Record one answer: accepted, or refused with the reason."""
    name = received.node.name
    try:
        kind, facts, payload = _accept(number, received, strategy.accept)
    except FedTuneError as error:
        log.warning("round %d: %s: %s", number, name, error, extra={"node": name})
        refusal = {"reason": str(error), "exit_code": error.exit_code}
        progress.take(ledger.append("refused", round=number, node=name, body=refusal))
    else:
        progress.take(ledger.append(kind, round=number, node=name, body=facts, blob=payload))


def _take_late(number: int, strategy: TuningStrategy, fleet: Fleet, ledger: Ledger, progress: Progress) -> None:
    """Let replies to earlier rounds count in this one, where the strategy wants them."""
    for received in fleet.late():
        name = received.node.name
        round = getattr(received.message, "round", number)
        try:
            if name in progress.answered | {record.node for record in ledger.records("reply", round=round)}:
                raise ProtocolError("it has answered for this round already: the reply is left out.")
            kind, facts, payload = _accept(number, received, strategy.accept_late, late=True)
        except FedTuneError as error:
            log.warning("round %d: %s answered late: %s", number, name, error, extra={"node": name})
            ledger.append("late", round=number, node=name, body={"reason": str(error)})
        else:
            progress.take(ledger.append(kind, round=number, node=name, body=facts, blob=payload))


def _log_missing(round: int, statuses: dict[str, NodeStatus]) -> None:
    missing = [
        f"{name} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one.since))} ({one.reason})"
        for name, one in statuses.items()
        if not one.present
    ]
    if missing:
        log.warning("round %d: missing: %s", round, ", ".join(missing))


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
    facts |= {"kind": message.kind, "bytes_down": received.bytes_down, "bytes_up": received.bytes_up, "late": late}
    facts["way"] = "stream" if received.streamed else "flower"
    return "reply" if counts else "acknowledged", facts, payload


def _commit(number: int, strategy: TuningStrategy, replies: list[Record], ledger: Ledger) -> ArrayRecord:
    arrays, metrics = strategy.aggregate_train(number, as_messages(replies, ledger))
    if arrays is None:
        raise NodesError(f"round {number}: the strategy made no model of {counted(len(replies), 'reply', 'replies')}.")
    state = strategy.state()
    files = {label: ledger.put_file(tensors) for label, tensors in state.files.items()}
    facts: dict[str, Any] = {
        "files": files,
        "metrics": dict(metrics or {}),
        "replies": [record.node for record in replies],
    }
    ledger.append("round", round=number, body=facts, blob=safetensors.torch.save(state.tensors))
    log.info("round %d: %d replies, %s", number, len(replies), _brief(facts["metrics"]))
    return arrays


def _too_few(round: int, ledger: Ledger, attempts: int) -> FedTuneError:
    refused = list(ledger.records("refused", round=round))
    reasons = dict.fromkeys(f"{record.node}: {record.body['reason']}" for record in refused)
    line = f"round {round} had too few usable replies in {attempts} attempts: "
    line += "; ".join(reasons) or "no node answered by the deadline"
    if {record.body["exit_code"] for record in refused} == {DivergenceError.exit_code}:
        return DivergenceError(f"the run diverges: {line}. Start another one with a lower 'train.lr'.")
    return NodesError(f"{line}. Start the run again to continue from round {round - 1}.")


def _brief(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )
