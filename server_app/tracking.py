"""Experiment trackers, by the names that transformers gives them, fed from the ledger at one place.

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

from fedtune_strategies.config import Config
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.folders import make_folder, remove_folder
from server_app.ledger import TRAFFIC, Ledger, Record

log = logging.getLogger("fedtune")

# Metrics by name, and the round.
Log = Callable[[dict[str, float], int], None]


@contextlib.contextmanager
def tracking(config: Config, ledger: Ledger, settings: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Open the tracker of ``run.report-to``.

    Parameters
    ----------
    config : Config
        The run configuration.
    ledger : Ledger
        The run's ledger.
    settings : dict
        The flat run configuration, shown by the tracker.

    Yields
    ------
    callable
        Call it to report what the ledger has got since the last call. It never raises: a tracker that fails is named
        in the log and left alone, the run goes on.

    Raises
    ------
    ConfigError
        The tracker is not installed, or does not start.
    """
    name = config.run.report_to
    if name == "none":
        yield lambda: None
        return
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"'run.report-to' is {name!r}, which is not installed here: pip install {name}.")
    with contextlib.ExitStack() as stack:
        try:
            tell = stack.enter_context(_TRACKERS[name](ledger.folder, settings))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"'run.report-to' is {name!r}, which does not start: {reason}.") from None
        yield _Report(ledger, tell, name).catch_up


class _Report:
    def __init__(self, ledger: Ledger, tell: Log, name: str) -> None:
        self._ledger, self._tell, self._name = ledger, tell, name
        self._seen = 0
        self._bytes = {"bytes_up": 0, "bytes_down": 0}

    def catch_up(self) -> None:
        """Report the records that are new."""
        if not self._name:
            return
        try:
            for record in self._ledger.records(after=self._seen):
                if metrics := self._metrics(record):
                    self._tell(metrics, record.round)
                self._seen = record.seq
        except Exception as error:
            log.warning("%s takes no more reports: %s: %s", self._name, type(error).__name__, error)
            self._name = ""

    def _metrics(self, record: Record) -> dict[str, float]:
        body = record.body
        if record.kind in TRAFFIC:
            self._bytes = {key: count + body.get(key, 0) for key, count in self._bytes.items()}
        elif record.kind == "round":
            counts = {"nodes/replies": len(body["replies"])}
            totals = {key.replace("_", "/"): count for key, count in self._bytes.items()}
            return {**_numbers(body["metrics"]), **counts, **totals}
        elif record.kind == "evaluation":
            return {key: value for key, value in _numbers(body).items() if key.startswith("eval/")}
        return {}


def _numbers(facts: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in facts.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _tensorboard(folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    place = folder / "tensorboard"
    remove_folder(place)
    make_folder(place)
    with SummaryWriter(str(place)) as writer:
        writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in sorted(settings.items())))

        def tell(metrics: dict[str, float], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield tell


@contextlib.contextmanager
def _wandb(folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "fedtune")
    with wandb.init(project=project, name=folder.name, config=settings, dir=str(folder)) as run:
        yield lambda metrics, step: run.log(metrics, step=step)


@contextlib.contextmanager
def _mlflow(folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedtune"))
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_params(settings)
        yield lambda metrics, step: mlflow.log_metrics(metrics, step=step)


@contextlib.contextmanager
def _trackio(folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", "fedtune")
    trackio.init(project=project, name=folder.name, config=settings, embed=False)
    try:
        yield lambda metrics, step: trackio.log(metrics, step=step)
    finally:
        trackio.finish()


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
