"""Drive a strategy over a fleet, round by round, from its ledger.

A round is: ask, accept reply by reply (each one appended to the ledger at once), aggregate, append the new state.
A server that was stopped in the middle of a round asks only the nodes whose reply it has not got.
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
from server_app.node_status import node_status

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
        Asked after every evaluation whether to go on.

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
                arrays = _round(done + 1, strategy, arrays, fleet, ledger, config, meanwhile)
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
    if round is None:
        for record in ledger.records("asked", after=newest.seq if newest else 0):
            if not record.body["again"]:
                strategy.note_asked(record.body["nodes"])
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
    meanwhile: Callable[[], None],
) -> ArrayRecord:
    failed: set[str] = set()
    for attempt in range(1, config.round.attempts + 1):
        fleet.exclude(())
        fleet.wait_for_nodes(config.strategy.min_nodes, config.round.node_wait)
        _take_late(number, strategy, fleet, ledger)
        answered = _answered(number, ledger)
        # Whose late reply counts in this round is not asked in it, also after a restart.
        fleet.exclude(answered - _asked(number, ledger) if attempt == 1 else answered)
        _log_missing(number, ledger)
        if attempt > 1 and set(fleet.nodes) - failed:
            fleet.exclude(answered | failed)
        # A server that was stopped in the round goes on with the nodes that it had asked.
        only = _unanswered(number, ledger) if attempt == 1 else None
        failed |= _ask(number, strategy, arrays, fleet, ledger, config, only, meanwhile)
        replies = list(ledger.records("reply", round=number))
        if len(replies) >= config.strategy.min_replies:
            return _commit(number, strategy, replies, ledger)
        log.warning(
            "round %d, attempt %d of %d: %d usable replies, %d needed",
            number, attempt, config.round.attempts, len(replies), config.strategy.min_replies,
        )  # fmt: skip
    raise _too_few(number, ledger, config.round.attempts)


def _ask(
    number: int,
    strategy: TuningStrategy,
    arrays: ArrayRecord,
    fleet: Fleet,
    ledger: Ledger,
    config: Config,
    only: set[str] | None,
    meanwhile: Callable[[], None],
    *,
    again: bool = False,
) -> set[str]:
    """Send the round's tasks and record what comes; return the names of the nodes that gave nothing usable."""
    nodes = {node.id: node for node in fleet.nodes.values()}
    tasks = list(strategy.configure_train(number, arrays, ConfigRecord(), fleet))
    answered = _answered(number, ledger)
    if only is not None:
        tasks = [task for task in tasks if nodes[task.metadata.dst_node_id].name in only]
    asked = {node.name: node.num_examples for node in (nodes[task.metadata.dst_node_id] for task in tasks)}
    ledger.append("asked", round=number, body={"nodes": asked, "again": again})
    if not again:
        strategy.note_asked(asked)
    failed, missing_state = set(asked), set()
    patience = config.round.deadline if strategy.takes_late else 0.0
    for received in fleet.exchange(tasks, config.round.deadline, patience, meanwhile):
        try:
            if _accept(number, received, strategy.accept, ledger):
                answered.add(received.node.name)
                if config.round.grace and len(answered) == config.strategy.min_replies:
                    fleet.shorten_deadline(config.round.grace)
            failed.discard(received.node.name)
            if isinstance(received.message, protocol.StateMissing):
                missing_state.add(received.node.name)
        except FedTuneError as error:
            name = received.node.name
            log.warning("round %d: %s: %s", number, name, error, extra={"node": name})
            facts = {"reason": str(error), "exit_code": error.exit_code}
            ledger.append("refused", round=number, node=received.node.name, body=facts)
    _take_late(number, strategy, fleet, ledger)
    for name in sorted(failed):
        log.warning("round %d: no usable reply from %s", number, name, extra={"node": name})
    if missing_state and not again:
        # Restarted nodes take part in this round too: the strategy now sends them all they need.
        failed |= _ask(number, strategy, arrays, fleet, ledger, config, missing_state, meanwhile, again=True)
    return failed


def _take_late(number: int, strategy: TuningStrategy, fleet: Fleet, ledger: Ledger) -> None:
    """Let replies to earlier rounds count in this one, where the strategy wants them."""
    for received in fleet.late():
        name = received.node.name
        try:
            if name in _answered(number, ledger) | _answered(getattr(received.message, "round", number), ledger):
                raise ProtocolError("it has answered for this round already: the reply is left out.")
            _accept(number, received, strategy.accept_late, ledger)
        except FedTuneError as error:
            log.warning("round %d: %s answered late: %s", number, name, error, extra={"node": name})
            ledger.append("late", round=number, node=name, body={"reason": str(error)})


def _answered(round: int, ledger: Ledger) -> set[str]:
    return {record.node for record in ledger.records("reply", round=round)}


def _unanswered(round: int, ledger: Ledger) -> set[str] | None:
    """Return who was asked and has not answered; None where nobody was, or nobody has."""
    asked, answered = _asked(round, ledger), _answered(round, ledger)
    return asked - answered if asked & answered else None


def _asked(round: int, ledger: Ledger) -> set[str]:
    return set().union(*(record.body["nodes"] for record in ledger.records("asked", round=round)))


def _log_missing(round: int, ledger: Ledger) -> None:
    missing = [
        f"{name} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one.since))} ({one.reason})"
        for name, one in node_status(ledger).items()
        if not one.present
    ]
    if missing:
        log.warning("round %d: missing: %s", round, ", ".join(missing))


def _accept(number: int, received: NodeReply, check: Callable[[int, protocol.Message], bool], ledger: Ledger) -> bool:
    message = received.message
    if isinstance(message, FedTuneError):
        raise message
    sender = getattr(message, "node", None)
    if sender != received.node.name:
        raise ProtocolError(f"the reply bears the name of {sender!r}: it is left out.")
    way = "stream" if received.streamed else "flower"
    traffic = {"kind": message.kind, "bytes_down": received.bytes_down, "bytes_up": received.bytes_up, "way": way}
    with refusing():
        counts = check(number, message)
    if not counts:
        ledger.append("acknowledged", round=number, node=received.node.name, body=traffic)
        return False
    assert received.content is not None
    _, payload = from_record(received.content)
    facts: dict[str, Any] = {
        key: value for key, value in vars(message).items() if isinstance(value, str | int | float) and key != "node"
    }
    facts |= traffic
    ledger.append("reply", round=number, node=received.node.name, body=facts, blob=payload)
    return True


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
    return NodesError(f"{line}. Start the run again to go on from round {round - 1}.")


def _brief(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )
