"""Experiment trackers: accelerate's, by the names that it gives them, fed from the ledger at one place.

Each start of a server makes one run in the tracker and tells it all that the ledger holds: a resumed run is whole, and
a tracker that was away has missed nothing after the next start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from fedtune_strategies.config import Config
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.folders import make_folder, remove_folder
from server_app.ledger import Ledger
from server_app.run_view import Evaluation, Round, RunView

log = logging.getLogger("fedtune")


@contextlib.contextmanager
def tracking(config: Config, ledger: Ledger, settings: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Open the tracker of ``run.report-to``; yields what reports all that the ledger has got since the last call.

    That never raises: a tracker that fails is named in the log and left alone, the run continues.
    """
    name = config.run.report_to
    if name == "none":
        yield lambda: None
        return
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"'run.report-to' is {name!r}, which is not installed here: pip install {name}.")
    try:
        tracker = _start(name, ledger.folder, settings)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"'run.report-to' is {name!r}, which does not start: {reason}.") from None
    try:
        yield _Report(RunView(ledger.folder), tracker).catch_up
    finally:
        tracker.finish()


class _Report:
    def __init__(self, view: RunView, tracker: GeneralTracker) -> None:
        self._view, self._tracker = view, tracker
        self._rounds, self._works = 0, True
        self._evaluations: dict[int, Evaluation] = {}
        self._up = self._down = 0

    def catch_up(self) -> None:
        """Report the rounds and evaluations that are new."""
        if not self._works:
            return
        try:
            self._view.update()
            for one in self._view.done[self._rounds :]:
                self._tracker.log(self._metrics(one), step=one.number)
            for number, evaluation in self._view.evaluations.items():
                if evaluation != self._evaluations.get(number):  # with answers a second time
                    self._tracker.log(_measured(evaluation), step=number)
            self._rounds, self._evaluations = len(self._view.done), dict(self._view.evaluations)
        except Exception as error:
            log.warning("%s takes no more reports: %s: %s", self._tracker.name, type(error).__name__, error)
            self._works = False

    def _metrics(self, one: Round) -> dict[str, float]:
        self._up, self._down = self._up + one.bytes_up, self._down + one.bytes_down
        metrics = {key: float(value) for key, value in one.metrics.items() if isinstance(value, int | float)}
        return metrics | {"nodes/replies": one.replies, "bytes/up": self._up, "bytes/down": self._down}


def _measured(one: Evaluation) -> dict[str, float]:
    metrics = {"eval/loss": one.loss, "eval/perplexity": one.perplexity, "eval/rougeL": one.rouge_l}
    return {key: value for key, value in metrics.items() if value is not None}


def _start(name: str, folder: Path, settings: dict[str, Any]) -> GeneralTracker:
    PartialState(cpu=True)  # accelerate asks it whether this is the main process
    project = os.environ.get(f"{name.upper()}_PROJECT", "fedtune")
    match name:
        case "tensorboard":
            place = folder / "tensorboard"
            remove_folder(place)
            make_folder(place)
            own: dict[str, Any] = {"run_name": ".", "logging_dir": str(place)}
        case "mlflow":
            own = {"experiment_name": project, "run_name": folder.name}
        case "wandb":
            own = {"run_name": project, "name": folder.name, "dir": str(folder)}
        case "trackio":
            own = {"run_name": project, "name": folder.name, "embed": False}
    tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](**own)
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker
