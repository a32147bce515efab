"""The operator's list of members, as ``fedtune serve`` keeps it: which id of Flower, and so which key, bears a name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fedtune_strategies.admission import Members
from fedtune_strategies.errors import ResourceError
from fedtune_strategies.folders import MEMBERS_FILE

log = logging.getLogger("fedtune")


def listed_members() -> Members | None:
    """Return what reads the list; None in a federation of plain Flower, which has none."""
    if file := os.environ.get(MEMBERS_FILE):
        return lambda: read_members(Path(file))
    log.warning(
        "no list of members (`fedtune serve` keeps one): nodes are called what they call themselves, so a registered "
        "node can take the name of one that is absent"
    )
    return None


def read_members(file: Path) -> Mapping[int, str]:
    """Read the list; a federation that nobody has joined yet has none."""
    if not file.exists():
        return {}
    try:
        members = json.loads(file.read_text())
        return {one["node_id"] & (2**64 - 1): name for name, one in members.items() if one["state"] == "member"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResourceError(f"the list of members {file} cannot be read ({type(error).__name__}).") from None
