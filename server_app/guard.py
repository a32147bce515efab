"""Whether a run still improves: where it diverges or its patience ends, and which of its rounds is the best."""

from __future__ import annotations

import math
import statistics
from collections import deque

from fedtune_strategies.config import Config
from fedtune_strategies.errors import DivergenceError
from server_app.ledger import Ledger, Record

ROUNDS = 3
"""How many measurements in a row must be above the limit: one alone may be a bad batch."""


class Guard:
    """Follow a run's losses in its ledger; `best` is the round of the lowest loss, 0 for the base model.

    With held-out data the held-out loss counts, otherwise the nodes' training loss: the median over a round's nodes of
    how far each is above its own lowest, since nodes have unlike data. A loss that came with a round's reply was
    measured on the model of the round before.
    """

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.best = 0
        self._run, self._held_out, self._ledger = config.run, bool(config.eval.data), ledger
        self._seen = 0
        self._lowest, self._evaluated, self._without_better = math.inf, -1, 0
        self._node_lowest: dict[str, float] = {}
        self._losses: dict[str, float] = {}
        self._rises: deque[float] = deque(maxlen=ROUNDS)

    def look(self) -> str:
        """Take up what is new; return why the run is finished early, empty where it is not."""
        kinds = ("evaluation",) if self._held_out else ("reply", "round")
        after, self._seen = self._seen, self._ledger.end()
        for record in self._ledger.records(*kinds, after=after):
            self._take(record)
            self._seen = max(self._seen, record.seq)
        if self._run.patience and self._without_better >= self._run.patience:
            return (
                f"finished in round {self._evaluated}: no lower held-out loss in {self._without_better} evaluations "
                f"('run.patience') than {self._lowest:.4f} after round {self.best}"
            )
        return ""

    def _take(self, record: Record) -> None:
        match record.kind:
            case "evaluation" if record.round > self._evaluated:  # a kept round is evaluated once more at the end
                self._evaluation(record.round, record.body["eval/loss"])
            case "reply" if math.isfinite(loss := record.body.get("loss", math.nan)):
                self._losses[record.node] = loss
            case "round":
                self._training(record.round)

    def _evaluation(self, round: int, loss: float) -> None:
        self._evaluated = round
        if not math.isfinite(loss):
            self._stop(round, f"held-out loss is {loss}")
        better = loss < self._lowest
        self._without_better = 0 if better else self._without_better + 1
        if better:
            self.best, self._lowest = round, loss
        self._rise(round, loss - self._lowest, "held-out loss")

    def _training(self, round: int) -> None:
        known = [loss - self._node_lowest[name] for name, loss in self._losses.items() if name in self._node_lowest]
        for name, loss in self._losses.items():
            self._node_lowest[name] = min(loss, self._node_lowest.get(name, loss))
        self._losses = {}
        if known:
            rise = statistics.median(known)
            if rise <= 0:
                self.best = round - 1
            self._rise(round, rise, "nodes' training loss")

    def _rise(self, round: int, rise: float, what: str) -> None:
        self._rises.append(rise)
        if self._run.divergence and len(self._rises) == ROUNDS and min(self._rises) > self._run.divergence:
            told = ", ".join(f"{one:.2f}" for one in self._rises)
            self._stop(round, f"the {what} was {told} above its lowest in {ROUNDS} rounds in a row ('run.divergence')")

    def _stop(self, round: int, why: str) -> None:
        if self._run.divergence:
            raise DivergenceError(
                f"the run diverges: in round {round} {why}. Start another one with a lower 'train.lr'."
            )
