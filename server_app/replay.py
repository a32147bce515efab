"""Folding a run's replies again: to check that they make the recorded model, or to leave nodes out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from flwr.app import ArrayRecord, ConfigRecord

from fedtune_strategies.admission import Node
from fedtune_strategies.errors import LedgerError
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.method import register_messages
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_space import tuned_parameters
from fedtune_strategies.strategy import TuningStrategy
from fedtune_strategies.testing import InMemoryGrid
from fedtune_strategies.words import counted
from server_app.base_model import load_base
from server_app.export import export_model
from server_app.ledger import Ledger, Record
from server_app.rounds import as_messages, restore


@dataclass(frozen=True)
class Replayed:
    """What a replay did."""

    rounds: int
    # replies that count in the new model, and those that do not
    kept: int
    left_out: int


def replay(
    run: Path, without: Collection[str] = (), round: int | None = None, out: Path | None = None, model: str = ""
) -> Replayed:
    """Fold a run's replies again, up to a round, and export the model where `out` says.

    With nobody left out, the replies must make the very model that the ledger holds, bit for bit. With nodes left out,
    the model is the sum of what the others contributed, as they computed it: the others' replies were made on weights
    in which the left-out nodes had a part, so this is not the run that would have been without them. Under FedKSeed it
    is exactly what the server would have made of the same replies.
    """
    ledger = Ledger.read(run)
    started = ledger.last("start")
    if started is None:
        raise LedgerError(f"the run in {run} has not started: there is nothing to replay.")
    if (pruned := ledger.last("pruned")) is not None:
        raise LedgerError(
            f"what nodes sent in rounds 1 to {pruned.round} of {run} was removed by `fedtune ledger prune` or "
            "'run.prune': it can be resumed and exported, but not replayed."
        )
    _check_names(without, ledger, run)
    config = parse(started.body["config"])
    language, base, _ = load_base(config, ledger, model)
    parameters = tuned_parameters(language.model)
    strategy = register_messages(config.method.name).strategy(config, language.model, base)
    done, kept, left_out = 0, 0, 0
    arrays = strategy.initial_arrays()
    for record in ledger.records("round"):
        if round is not None and record.round > round:
            break
        replies = [reply for reply in ledger.records("reply", round=record.round) if reply.node not in without]
        arrays = _fold(strategy, arrays, record, replies, ledger)
        done, kept = record.round, kept + len(replies)
        left_out += len(record.body["replies"]) - len(replies)
    if round not in (None, done):
        raise LedgerError(f"the run in {run} has {counted(done, 'round')}, not {round}: choose one of them.")
    recorded = register_messages(config.method.name).strategy(config, language.model, base)
    was = recorded.materialise(restore(recorded, ledger, done)[1], parameters)
    if strategy.materialise(arrays, parameters) != was and not without:
        raise LedgerError(
            f"the replies in {run} do not make the model that it holds: "
            "use the FedTune version that wrote it, or restore it from a backup."
        )
    if out is not None:
        export_model(language, config, ledger, done, out, without=sorted(without))
    return Replayed(done, kept, left_out)


def _fold(
    strategy: TuningStrategy, arrays: ArrayRecord, record: Record, replies: list[Record], ledger: Ledger
) -> ArrayRecord:
    present = [Node(name, number, 1) for number, name in enumerate(record.body["replies"])]
    fleet = Fleet(InMemoryGrid({}), "", nodes=present)
    strategy.configure_train(record.round, arrays, ConfigRecord(record.body["used"]), fleet)
    folded = strategy.aggregate_train(record.round, as_messages(replies, ledger))[0] if replies else None
    arrays = folded or strategy.skip(record.round, arrays)
    if strategy.history:
        stored = safetensors.torch.load(ledger.payload(record))
        as_it_was = {name: stored[name] for name in strategy.history}
        arrays = strategy.restore(strategy.state().tensors | as_it_was, lambda label: None)
    return arrays


def _check_names(without: Iterable[str], ledger: Ledger, run: Path) -> None:
    known = sorted({record.node for record in ledger.records("reply")})
    for name in without:
        if name not in known:
            raise LedgerError(f"no reply of '{name}' counts in the run in {run}: its nodes are {', '.join(known)}.")
