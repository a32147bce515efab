"""The base model of a run: known by the fingerprint of its weights, wherever its folder is today."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedtune_strategies.config import Config
from fedtune_strategies.errors import FedTuneError, FingerprintError
from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.model import LanguageModel, load_model
from fedtune_strategies.seed_space import fingerprint
from server_app.ledger import Ledger

KIND = "base"
"""Kind of the record that holds the fingerprint."""


def load_base(config: Config, ledger: Ledger, place: str = "") -> tuple[LanguageModel, Mapping[str, Tensor], str]:
    """Load a run's base model: it, its weights and their fingerprint, which must be those that the run started with.

    `place` is where the model is if not, or not any more, at ``model.name``.
    """
    name = place or config.model.name
    try:
        language = load_model(name, config.model.dtype, base=config.model.base)
    except FedTuneError as error:
        if ledger.last(KIND) is None or place:
            raise
        raise type(error)(f"{error}; or say with --model where the run's base model is now") from None
    base = base_tensors(language)
    found, recorded = fingerprint(base), ledger.last(KIND)
    if recorded is not None and recorded.body["fingerprint"] != found:
        raise FingerprintError(
            f"{name} is another model than the one that the run in {ledger.folder} started with: take that one"
        )
    return language, base, found
