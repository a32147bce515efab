"""One run from its configuration to the exported model, over any grid."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedtune_strategies.config import Config
from fedtune_strategies.errors import DivergenceError, FedTuneError, LedgerError
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.folders import check_ours, temporary_files_in
from fedtune_strategies.logs import about
from fedtune_strategies.method import register_messages
from fedtune_strategies.model_transfer import ModelSource
from fedtune_strategies.run_config import defaults, from_flower, parse
from fedtune_strategies.seed_space import tuned_parameters
from fedtune_strategies.stream.grid import streaming
from server_app.guard import Guard
from server_app.ledger import Ledger
from server_app.members import listed_members
from server_app.rounds import Run, restore, run_rounds
from server_app.steps import write_measured, write_steps
from server_app.tracking import tracking

log = logging.getLogger("fedtune")

MODEL = "model"  # the export, in a run's folder
# What may differ between the start of a run and its resumption: nothing on which rounds depend that have begun. They
# keep the share of the step size that is recorded with them, though a schedule runs over all rounds.
_FREE_KEYS = ("num-server-rounds", "run.", "round.", "eval.", "stream.", "strategy.min-nodes", "model.name")


def execute(grid: Grid, flat: Mapping[str, Any], run_id: int) -> Path:
    """Run a configuration to its end, or resume it; returns the folder of the exported model.

    `run_id` is Flower's id of the run; it names the run's folder where ``run.dir`` is empty.
    """
    flat = from_flower(flat)
    config = parse(flat)
    ledger = _open_ledger(config, flat, run_id)
    try:
        with (
            about(run=ledger.folder.name),
            temporary_files_in(ledger.folder),
            tracking(config, ledger, defaults(config.method.name, flat) | dict(flat)) as report,
            streaming(grid, config.stream) as both_ways,
        ):
            fleet = Fleet(
                both_ways,
                on_event=lambda kind, node, line, bytes_down: _note(ledger, kind, node, line, bytes_down),
                members=listed_members(),
                only=[name.strip() for name in config.strategy.nodes.split(",") if name.strip()],
            )
            fleet.greet_early()
            return _execute(fleet, config, ledger, report)
    except FedTuneError as error:
        ledger.append("failed", body={"exit_code": error.exit_code, "message": str(error), **error.facts})
        raise
    finally:
        ledger.close()


def run_folder(config: Config, run_id: int) -> Path:
    """Return the folder of a run's ledger and export."""
    if config.run.dir:
        return Path(config.run.dir).expanduser()
    home = os.environ.get("FEDTUNE_HOME", "~/.fedtune")
    return Path(home).expanduser() / "runs" / str(run_id)


def _execute(fleet: Fleet, config: Config, ledger: Ledger, report: Callable[[], None]) -> Path:
    # What these import takes seconds, in which the nodes that were greeted load their models.
    from fedtune_strategies.language.model import check_context
    from server_app.base_model import KIND, load_base
    from server_app.evaluation import evaluate, load_held_out
    from server_app.export import export_model

    language, base, base_fingerprint = load_base(config, ledger)
    if ledger.last(KIND) is None:
        ledger.append(KIND, body={"fingerprint": base_fingerprint})
    check_context(language.name, language.model.config, config.train.seq_length)
    held_out = load_held_out(config, language)
    parameters = tuned_parameters(language.model)
    strategy = register_messages(config.method.name).strategy(config, language.model, base)
    # No method sends more than every parameter in float32, and what describes it.
    fleet.allow_replies(5 * sum(parameter.numel() for parameter in parameters.values()))
    fleet.know_base(base_fingerprint, ModelSource(language.folder).answer)

    fleet.watch_named_steps(lambda steps: write_steps(ledger.folder, steps))

    newest = -1, ""

    def place(number: int, arrays: ArrayRecord) -> None:
        nonlocal newest
        newest = number, strategy.materialise(arrays, parameters)

    def evaluate_newest() -> None:
        number, _ = newest
        if number % config.eval.every == 0 or number == config.num_server_rounds:
            evaluate_weights(*newest, with_answers=number in (0, config.num_server_rounds))
        report()

    def evaluate_weights(number: int, print_of_weights: str, *, with_answers: bool) -> None:
        if held_out is None or _is_evaluated(ledger, number, with_answers and held_out.answers is not None):
            return
        with about(round=number):
            answered = (record.body.get("answered", 0) for record in ledger.records("evaluation"))
            facts = evaluate(
                language, held_out, config, with_answers=with_answers,
                most=next(filter(None, answered), 0),  # the same before and after
                tell=lambda done, total: write_measured(ledger.folder, done, total),
            )  # fmt: skip
            ledger.append("evaluation", round=number, body=facts | {"fingerprint": print_of_weights})
            loss, perplexity = facts["eval/loss"], facts["eval/perplexity"]
            log.info("round %d: held-out loss %.4f, perplexity %.2f", number, loss, perplexity)

    def export(number: int) -> Path:
        """Take the model to a round that is over, unless it is there, and write it."""
        at = newest
        if number != newest[0]:
            again = register_messages(config.method.name).strategy(config, language.model, base)
            at = number, again.materialise(restore(again, ledger, number)[1], parameters)
        evaluate_weights(*at, with_answers=True)
        report()
        return export_model(language, config, ledger, number, ledger.folder / MODEL)

    guard = Guard(config, ledger)
    try:
        done, early = run_rounds(Run(strategy, fleet, ledger, config), place, evaluate_newest, guard)
    except DivergenceError as error:
        folder = export(guard.best)
        raise DivergenceError(
            f"{error} The model after round {guard.best} is in {folder}.", {"model": str(folder), "kept": guard.best}
        ) from None
    kept = guard.best if config.run.keep == "best" else done
    folder = export(kept)
    ledger.append("finished", round=done, body={"model": str(folder), "kept": kept, "message": early})
    log.info("finished: the tuned model, of round %d, is in %s", kept, folder)
    return folder


def _open_ledger(config: Config, flat: Mapping[str, Any], run_id: int) -> Ledger:
    folder = run_folder(config, run_id)
    there = _has_started(folder)
    if there and config.run.resume == "never":
        raise LedgerError(f"{folder} holds a run already: choose another 'run.dir' or set 'run.resume' to 'auto'.")
    if not there and config.run.resume == "always":
        raise LedgerError(f"{folder} holds no run to resume: check 'run.dir' or set 'run.resume' to 'auto'.")
    check_ours(folder / MODEL)  # before anything is trained: the export would have to replace it
    ledger = Ledger(folder)
    started = ledger.last("start")
    settings = defaults(config.method.name, flat) | dict(flat)
    if started is not None and ledger.last("asked") is not None:  # a start that asked nobody binds nobody
        _check_same_run(started.body["config"], settings, folder)
    ledger.append("start", body={"config": settings, "version": version("fedtune"), "run_id": str(run_id)})
    return ledger


def _has_started(folder: Path) -> bool:
    """Say whether a folder holds a run, and not only the note that one was submitted."""
    if not (folder / "ledger.sqlite").exists():
        return False
    with contextlib.closing(Ledger.read(folder)) as ledger:
        return ledger.last("start") is not None


def _check_same_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key) and not key.startswith(_FREE_KEYS):
            raise LedgerError(
                f"the run in {folder} was started with '{key}' = {before.get(key)!r}, now it is {now.get(key)!r}: "
                "set it back, or choose another 'run.dir'."
            )


def _is_evaluated(ledger: Ledger, round: int, with_answers: bool) -> bool:
    found = [record.body for record in ledger.records("evaluation", round=round)]
    return any("answers" in body for body in found) if with_answers else bool(found)


def _note(ledger: Ledger, kind: str, node: str, line: str, bytes_down: int) -> None:
    ledger.append(kind, node=node, body={"reason": line, "bytes_down": bytes_down})
