"""An owner's data as a run will read them, on the model that it will tune."""

from __future__ import annotations

from fedtune_strategies.config.node import NodeConfig
from fedtune_strategies.language.chat import try_template
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.model import check_model
from fedtune_strategies.language.model_files import is_here
from fedtune_strategies.words import counted


def read_data(own: NodeConfig, model: str = "") -> tuple[int, str]:
    """Read all rows, and try the model's chat template on them.

    `own`: the node's configuration, which names the data.
    `model`: the base model; one that is not here is not tried.
    Returns: how many examples there are, and how they can be read.
    Raises `FedTuneError`: the data or the model cannot be used, or not together.
    """
    rows = read_rows(own.data, own.format, own.columns, own.skip_bad)
    found = f"{counted(len(rows), 'example')}, {'bad rows left out' if own.skip_bad else 'all readable'}"
    moved = try_template(rows, check_model(model)[1]) if model and is_here(model) else 0
    return len(rows), found + ("; system messages join the user's first, as the model takes none" if moved else "")
