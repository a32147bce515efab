"""What tuning did between two rounds of a run: how far the model moved, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune_strategies.seed_space import tuned_parameters
from server_app.export import open_run
from server_app.ledger import Ledger
from server_app.run_view import RunView


@dataclass(frozen=True)
class TensorChange:
    """Change of one tensor."""

    name: str  # canonical name of the parameter
    relative: float  # length of the change over the length of the tensor, after the first of the two rounds
    changed: float  # share of its elements that differ, 0 to 1


@dataclass(frozen=True)
class Change:
    """Change of a whole model."""

    first: int
    second: int
    # as in `TensorChange`, of all parameters together
    relative: float
    changed: float
    loss: tuple[float | None, float | None]  # held-out loss after either round, where the run measured it
    tensors: list[TensorChange]  # of every parameter, the most changed first


def compare_rounds(run: Path, first: int, second: int | None) -> Change:
    """Rebuild the model after two rounds from a run's ledger and compare the weights; the last round by default."""
    ledger = Ledger.read(run)
    _, language, rebuild = open_run(run, ledger)
    rebuild(first)
    before = {name: tensor.detach().clone() for name, tensor in tuned_parameters(language.model).items()}
    second = rebuild(second)
    total, tensors = np.zeros(4), []
    for name, after in tuned_parameters(language.model).items():
        was, now = before[name].double(), after.detach().double()
        sums = np.array(
            [(now - was).square().sum().item(), was.square().sum().item(), (now != was).sum().item(), was.numel()]
        )
        tensors.append(TensorChange(name, *_shares(*sums)))
        total += sums
    tensors.sort(key=lambda one: -one.relative)
    losses = {number: one.loss for number, one in RunView.of(run).evaluations.items()}
    loss = (losses.get(first), losses.get(second))
    return Change(first, second, *_shares(*total), loss, tensors)


def _shares(moved: float, length: float, different: float, count: float) -> tuple[float, float]:
    relative = math.sqrt(moved / length) if length else math.inf if moved else 0.0
    return relative, float(different / count)
