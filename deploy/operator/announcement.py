"""What an operator announces: the run's settings and what it takes of a node. Joiners see it before they agree."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.common.paths import write_json
from fedtune_strategies.config import Scalar, parse
from fedtune_strategies.errors import FedTuneError

EXAMPLES = 1000  # of a node, for the plan: nobody knows them yet


def announce(folder: Path, settings: Mapping[str, Scalar], nodes: int) -> None:
    """Write the offer of a server.

    Parameters
    ----------
    folder : Path
        The server's state.
    settings : mapping
        Keys of the run configuration that are set.
    nodes : int
        Size of the fleet.
    """
    write_json(folder / "offer.json", {"settings": dict(settings), "plan": _plan(settings, max(nodes, 1))})


def read_announcement(folder: Path) -> dict[str, Any]:
    """What `announce` wrote last; empty where there is nothing."""
    try:
        return dict(json.loads((folder / "offer.json").read_text()))
    except (OSError, ValueError):
        return {}


def _plan(settings: Mapping[str, Scalar], nodes: int) -> dict[str, Any] | None:
    from deploy.plan import plan
    from fedtune_strategies.language.model_files import model_folder

    config = parse(settings)
    with contextlib.suppress(FedTuneError):  # a method of another package, or a model that is not there yet
        return asdict(plan(config, model_folder(config.model.name), nodes, EXAMPLES))
    return None
