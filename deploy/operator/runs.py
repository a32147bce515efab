"""Runs of an operator: submit, follow by the ledger, submit again what died, resume, stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.common.app_folder import write_app
from deploy.common.flower_cli import Control, RunStatus
from deploy.common.paths import newest_runs, runs_folder
from deploy.common.processes import told_on_ctrl_c
from deploy.operator.announcement import announce
from deploy.operator.members import Members
from fedtune_strategies.config import Scalar
from fedtune_strategies.errors import FedTuneError, LedgerError, LinkError, RunError, error_from_code
from fedtune_strategies.run_config import defaults
from server_app.ledger import Ledger
from server_app.run_view import RunView

LOOK_EVERY = 0.5  # seconds between two looks at the ledger
ASK_EVERY = 60.0  # seconds between two questions to the SuperLink, a second of one core each
ASK_FIRST = 5.0  # seconds after which to ask about a run that has not begun: it may have failed before its ledger
STOP_WITHIN = 60.0  # seconds in which Flower ends a stopped ServerApp: at its next message or heartbeat
MOST_RESTARTS = 5  # without a round in between
# What Flower puts before the line of a ServerApp that ended by itself.
_RAISED = "ServerApp failed with exception: "


def new_folder(method: str) -> Path:
    """A folder for a new run, named after its method and the time."""
    return runs_folder() / f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_run(run: Path | None) -> Path:
    """The folder of a run: as named, by its name below the runs, or the newest."""
    for folder in [run.expanduser(), runs_folder() / run] if run else [runs_folder()]:
        if folder.is_dir() and (found := newest_runs(folder)):
            return found[0]
    if run is None:
        raise LedgerError(f"no run in {runs_folder()} yet: `fedtune run` starts one; or name a run's folder")
    raise LedgerError(f"no run in {run}: `fedtune runs` lists the names; or name a run's folder ('run.dir')")


def settings_of(folder: Path) -> dict[str, Scalar]:
    """The run configuration with which a run was started last."""
    view = RunView.of(folder)
    if not view.starts:
        raise LedgerError(f"the run in {folder} has not begun")
    return dict(view.config)


def submit(control: Control, settings: Mapping[str, Scalar]) -> int:
    """Submit a run, put that on its record, and announce it to those who join; returns Flower's id."""
    folder, method = Path(str(settings["run.dir"])), str(settings.get("method.name", ""))
    _record(folder, "submitted", {"config": defaults(method, settings) | dict(settings)})
    try:
        run_id = control.submit(write_app(control.folder / "app", settings), settings)
    except FedTuneError as error:
        _record(folder, "failed", {"exit_code": error.exit_code, "message": str(error)})
        raise
    announce(control.folder, settings, len(Members(control.folder).all()))
    return run_id


def tune(
    control: Control,
    settings: Mapping[str, Scalar],
    view: RunView,
    on_look: Callable[[RunView], object],
    on_event: Callable[[str], None],
) -> Path:
    """Submit a run and follow it to its end; submit it again when it died of no fault of its own.

    `settings`: the run configuration, with ``run.dir``. A run that is there is continued.
    `on_look`: called with the view at every look at the ledger, twice a second.
    `on_event`: called with a line about submissions.
    Raises `FedTuneError`: what ended the run.
    """
    folder, left, rounds = view.folder, MOST_RESTARTS, 0
    while True:
        run_id = submit(control, settings)
        on_event(f"submitted as Flower's run {run_id}; record: {folder}")
        with told_on_ctrl_c("the run continues: `fedtune status` shows it, `fedtune stop` stops it"):
            status = _follow(control, run_id, view, on_look, on_event)
        begun = _has_begun(view, run_id)
        ended = view.end if begun else None
        if ended and ended.kind == "finished":
            return Path(ended.body["model"])
        if ended and ended.kind == "failed":
            raise error_from_code(ended.body["exit_code"], ended.body["message"])
        if ended or status.state == "finished:stopped":
            raise RunError(f"the run was stopped; `fedtune resume {folder}` continues it")
        if not begun and status.details.startswith(_RAISED):
            line = status.details.removeprefix(_RAISED)
            _record(folder, "failed", {"exit_code": RunError.exit_code, "message": line})
            raise RunError(line)
        left = MOST_RESTARTS if len(view.done) > rounds else left - 1
        rounds = len(view.done)
        if not left:
            raise RunError(f"the run died {MOST_RESTARTS} times in a row ({status.details}): see `flwr log {run_id}`")
        on_event(f"the run died ({status.details or status.state}); going on from its record")
        settings = {**settings, "run.resume": "auto"}  # what is there now is this run


def _follow(
    control: Control,
    run_id: int,
    view: RunView,
    on_look: Callable[[RunView], object],
    on_event: Callable[[str], None],
) -> RunStatus:
    """Wait until a run has ended: its ledger says so at once, or that nobody writes it any more; else the SuperLink."""
    asked, ask_after = time.monotonic(), min(ASK_FIRST, ASK_EVERY)
    while True:
        begun = _has_begun(view, run_id)
        gone = begun and not Ledger.is_written(view.folder)
        with contextlib.suppress(LedgerError):  # until the ServerApp has made its ledger
            view.update()
        on_look(view)
        ended = view.end is not None and _has_begun(view, run_id)
        if ended or time.monotonic() - asked > ask_after:
            status = _status(control, run_id)
            asked, ask_after = time.monotonic(), min(2 * ask_after, ASK_EVERY)
            if not begun and not status.finished:
                on_event(f"the run has not begun yet: the SuperLink says '{status.state}'")
            if status.finished:
                with contextlib.suppress(LedgerError):
                    view.update()
                return status
        elif gone:  # Flower notices after about a minute, unless it was told to stop the run
            status = _status(control, run_id)
            return status if status.finished else RunStatus("died", "its ServerApp is gone")
        time.sleep(LOOK_EVERY)


def stop(control: Control, folder: Path) -> None:
    """Stop a run, and put that on its record; `tune` with its settings continues it later.

    Raises `RunError`: it has ended already.
    """
    view = RunView.of(folder)
    if not view.starts or view.end:
        raise RunError(f"the run in {folder} has ended already")
    control.stop_run(int(view.starts[-1]["run_id"]))
    limit = time.monotonic() + STOP_WITHIN
    while Ledger.is_written(folder) and time.monotonic() < limit:
        time.sleep(LOOK_EVERY)
    _record(folder, "stopped", {"message": "stopped by the operator"})


def _has_begun(view: RunView, run_id: int) -> bool:
    return bool(view.starts) and view.starts[-1].get("run_id") == str(run_id)


def _status(control: Control, run_id: int) -> RunStatus:
    # While the SuperLink is being started again nobody answers; the run continues meanwhile.
    try:
        return control.status(run_id)
    except LinkError as error:
        return RunStatus("unknown", str(error))


def _record(folder: Path, kind: str, body: dict[str, Any]) -> None:
    with contextlib.closing(Ledger(folder)) as ledger:
        ledger.append(kind, body=body)
