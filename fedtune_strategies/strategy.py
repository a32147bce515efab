"""What the strategies of FedTune add to Flower's: a state that can be stored, checked replies, weights on request."""

from __future__ import annotations

import logging
import math
import statistics
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtune_strategies.errors import FingerprintError, ProtocolError
from fedtune_strategies.lr_schedule import scheduled_share
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.messages import TrainReply
from fedtune_strategies.shared_random import sample

log = logging.getLogger("fedtune")

# A node weighs at most so many times the round's median node: how many examples it has is its own word.
LARGEST_SHARE = 10


@dataclass(frozen=True)
class State:
    """What a strategy must have stored to continue after a round.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Small state, stored whole after every round.
    files : dict of str to dict of str to Tensor
        Large parts by label, such as one block; only those that changed in the round. A later part of the same
        label replaces the earlier one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class TuningStrategy(Strategy):
    """A Flower ``Strategy`` that the server can stop, resume, evaluate and export after any round.

    The ``config`` of `configure_train` is the round's settings, at first `settings_of` the configuration. They are
    recorded with the round: a server that takes it up, and a replay, hand the recorded ones over, whatever the
    configuration says by then.

    Beside Flower's ``configure_train`` and ``aggregate_train``, a method says how its arrays become weights, which
    replies it accepts, and what to store. Evaluation happens on the server, so no evaluation tasks are sent.

    Attributes
    ----------
    history : tuple of str
        Names of stored tensors that say what the nodes were asked to do, not where the model is: a replay without some
        node takes them as they were.
    takes_late : bool
        Whether a reply that comes a round late can still count; see `accept_late`.
    """

    history: tuple[str, ...] = ()
    takes_late: bool = False

    @abstractmethod
    def initial_arrays(self) -> ArrayRecord:
        """Return the global model before the first round, as Flower's arrays."""

    @abstractmethod
    def materialise(self, arrays: ArrayRecord, parameters: Mapping[str, Tensor]) -> str:
        """Write the weights that the arrays stand for into a model.

        Parameters
        ----------
        arrays : ArrayRecord
            The global model.
        parameters : mapping of str to Tensor
            The model's parameters by canonical name; written in place.

        Returns
        -------
        str
            Fingerprint of the written weights.
        """

    def settled(self, answered: Collection[str]) -> bool:
        """Say whether no reply that is still missing can change the round: nobody waits long for those.

        Parameters
        ----------
        answered : collection of str
            The nodes whose reply counts.

        Returns
        -------
        bool
            False by default: every reply counts.
        """
        return False

    @abstractmethod
    def accept(self, round: int, reply: protocol.Message) -> bool:
        """Check one reply.

        Parameters
        ----------
        round : int
            The current round.
        reply : protocol.Message
            A decoded reply.

        Returns
        -------
        bool
            Whether the reply contributes to the round; False for a mere acknowledgement.

        Raises
        ------
        FedTuneError
            The reply must not be used; the line says why.
        """

    def accept_late(self, round: int, reply: protocol.Message) -> bool:
        """Check a reply to an earlier round's task; most methods have no use for it.

        Parameters
        ----------
        round : int
            The current round.
        reply : protocol.Message
            A decoded reply.

        Returns
        -------
        bool
            Whether the reply contributes to the current round.

        Raises
        ------
        FedTuneError
            The reply must not be used; the line says why.
        """
        raise ProtocolError("its round was over: the reply is left out.")

    @abstractmethod
    def state(self) -> State:
        """Return what to store after the round that was just aggregated."""

    def stored(self, load: Callable[[str], dict[str, Tensor] | None]) -> None:
        """Take note that what `state` returned is on disk; most methods need not.

        Parameters
        ----------
        load : callable
            As for `restore`. Its tensors are mapped: a large part that is taken from there costs no memory.
        """

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up a stored state.

        Parameters
        ----------
        tensors : dict of str to Tensor
            The small state of the last round.
        load : callable
            Gives the newest file of a label, mapped into memory and not to be written to; None where there is none.

        Returns
        -------
        ArrayRecord
            The global model after that round.
        """

    def used(self) -> dict[str, float]:
        """Return what the round that was just aggregated used beside its settings, replies and the state before it."""
        return {}

    def skip(self, round: int, arrays: ArrayRecord) -> ArrayRecord:
        """Let a round pass of whose replies a replay keeps none; for most methods it changes nothing.

        Parameters
        ----------
        round : int
            The round; `configure_train` was called for it.
        arrays : ArrayRecord
            The global model before it.

        Returns
        -------
        ArrayRecord
            The global model after it.
        """
        return arrays

    def note_asked(self, nodes: Mapping[str, int]) -> None:
        """Take note of whom a round really asks, also after a restart; most methods need not.

        Parameters
        ----------
        nodes : mapping of str to int
            Number of examples of each node, by name.
        """

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send nothing: evaluation happens on the server, and training metrics come with the replies."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return None, see `configure_evaluate`."""
        return None


def sampled(config: Any, nodes: Sequence[str], round: int) -> list[str]:
    """Return the nodes that a round asks, the same for the same seed, round and nodes.

    They are ``strategy.fraction-train`` of them, at least ``strategy.min-replies`` where there are as many.
    """
    settings = config.strategy
    count = max(settings.min_replies, int(np.rint(settings.fraction_train * len(nodes))))
    return sample((config.train.seed, round), list(nodes), min(count, len(nodes)))


SCHEDULE = "schedule"
"""In a round's settings: the share of the step size that the round uses."""


def settings_of(config: Any, round: int) -> dict[str, float]:
    """Return what the configuration says of a round that is about to begin: `SCHEDULE`."""
    train = config.train
    kind, warmup = getattr(train, "lr_schedule", "constant"), getattr(train, "warmup", 0.0)
    return {SCHEDULE: scheduled_share(round, config.num_server_rounds, kind, warmup)}


def share_of_step(settings: ConfigRecord) -> float:
    """Return `SCHEDULE` from what `TuningStrategy.configure_train` was given."""
    return cast(float, settings.get(SCHEDULE, 1.0))


def check_origin(reply: TrainReply, round: int, fingerprint: str) -> None:
    """Refuse a reply that belongs to another round or was computed on other weights.

    Parameters
    ----------
    reply : TrainReply
        The reply.
    round : int
        The current round.
    fingerprint : str
        Fingerprint of the weights on which the node should have worked.

    Raises
    ------
    ProtocolError
        The reply is of another round.
    FingerprintError
        The node worked on other weights.
    """
    if reply.round != round:
        raise ProtocolError(f"{reply.node} answered for round {reply.round} in round {round}: the reply is left out.")
    if reply.fingerprint != fingerprint:
        raise FingerprintError(
            f"{reply.node} worked on other weights (fingerprint {reply.fingerprint}, the server's is {fingerprint}): "
            "the reply is left out; check that node's base model, dtype and FedTune version."
        )


def shares(replies: Sequence[TrainReply], weighting: str) -> list[int]:
    """Return what each reply weighs in a round's mean: the same for all, or with ``strategy.weighting`` its examples.

    None weighs more than `LARGEST_SHARE` times their median (of two medians the lower, so that of two nodes neither can
    raise the limit alone).
    """
    if weighting != "examples" or not replies:
        return [1] * len(replies)
    limit = LARGEST_SHARE * statistics.median_low(reply.num_examples for reply in replies)
    return [min(reply.num_examples, limit) for reply in replies]


def mean_loss(replies: Sequence[TrainReply], weights: Sequence[float]) -> dict[str, float]:
    """Return ``train/loss`` as a metric: the weighted mean of the losses that are numbers, nothing where none is."""
    known = [(weight, reply.loss) for reply, weight in zip(replies, weights, strict=True) if math.isfinite(reply.loss)]
    total = sum(weight for weight, _ in known)
    return {"train/loss": sum(weight * loss for weight, loss in known) / total} if total else {}


def arrays_of(**tensors: Tensor) -> ArrayRecord:
    """Put named tensors into an ArrayRecord."""
    return ArrayRecord({name: Array(np.ascontiguousarray(tensor.numpy())) for name, tensor in tensors.items()})


def for_aggregation(arrays: ArrayRecord, weight: float, skipped: int) -> Message:
    """Return what a node's reply stands for, with its weight and skipped steps, as Flower's strategies aggregate it."""
    metrics = MetricRecord({"num-examples": weight, "train/skipped": skipped})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), dst_node_id=0, message_type="train")
