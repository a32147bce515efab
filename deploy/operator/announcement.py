"""What an operator announces: the run's settings and what it takes of a node. Joiners see it before they agree."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.common.paths import write_json
from fedtune_strategies.config import Scalar
from fedtune_strategies.errors import FedTuneError
from fedtune_strategies.run_config import parse
from server_app.ledger import Ledger

EXAMPLES = 1000  # of a node, for the plan: nobody knows them yet
BEGINS_WITHIN = 600.0  # seconds; a run that has not begun by then will not


def announce(folder: Path, settings: Mapping[str, Scalar], nodes: int) -> None:
    """Write the offer of a server: the keys of the run configuration that are set."""
    offer = {"settings": dict(settings), "plan": _plan(settings, max(nodes, 1)), "time": time.time()}
    write_json(folder / "offer.json", offer)


def read_announcement(folder: Path) -> dict[str, Any]:
    """What `announce` wrote last: of a run, while it runs or is about to begin; otherwise empty."""
    try:
        offer = dict(json.loads((folder / "offer.json").read_text()))
    except (OSError, ValueError):
        return {}
    named = str(offer["settings"].get("run.dir", ""))
    run = Path(named)
    begun = bool(named) and (run / "ledger.sqlite").exists()
    going_on = Ledger.is_written(run) if begun else time.time() - offer["time"] < BEGINS_WITHIN
    return offer if going_on or not named else {}


def _plan(settings: Mapping[str, Scalar], nodes: int) -> dict[str, Any] | None:
    from deploy.plan import plan
    from fedtune_strategies.language.model_files import model_folder

    config = parse(settings)
    with contextlib.suppress(FedTuneError):  # a method of another package, or a model that is not there yet
        return asdict(plan(config, model_folder(config.model.name), nodes, EXAMPLES))
    return None
