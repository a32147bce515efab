"""A round of FedKSeed: theta down, scalars up; or the points of past pools down, a point of a fresh one up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune_strategies.protocol.reply import TrainReply


@dataclass(frozen=True)
class SeedTask:
    """One round of FedKSeed for one node."""

    kind: ClassVar[str] = "seed-task"
    round: int  # round, from 1
    since: int  # the round whose theta the node must hold from its last task; 0 for the base model, theta = 0
    # uint8, packed whole numbers [pools, K]: what was added since then to theta of the pool that was in use, and of
    # every later one, in units; see `protocol.packing`
    change: Tensor
    unit: float  # unit of theta, a power of two
    levels: Tensor  # uint8, packed whole numbers [K]: which of the odds each seed has; empty for uniform draws
    odds: Tensor  # int16, relative odds of drawing a seed, by level; empty for uniform draws
    lr: float  # step size along one direction in this round; 0 where the node is to find one, in the first round
    eps: float  # distance of the losses from the weights
    limit: float  # Largest magnitude of a scalar; larger ones are clipped. Infinite where nothing is known yet.


@dataclass(frozen=True)
class SeedReply(TrainReply):
    """What a node answers to a `SeedTask`: scalars alone.

    The seeds need not travel: `fedtune_strategies.fedkseed.seed_draws` gives them to both sides.
    """

    kind: ClassVar[str] = "seed-reply"
    # float32, float16 or int8 [tau], projected gradients in the order of the draws, not a number where the loss was not
    # finite; see `protocol.packing.read_scalars`
    scalars: Tensor
    unit: float  # unit of the scalars
    lr: float  # step size that the node took: its own where the task left it open
    # Share of error in its slopes, where the node found the step size; otherwise not a number. See `calibrate`.
    noise: float
    # the node's secret for the draws of this round, 32 hexadecimal digits, so that no other node can tell which changes
    # of theta are its doing; empty where all may know its draws
    key: str = ""


@dataclass(frozen=True)
class GradientTask:
    """One round of the seed-space gradient for one node."""

    kind: ClassVar[str] = "gradient-task"
    round: int  # round, from 1; its pool is fresh
    # points that the node holds already, those of the first rounds; -1 where it is to begin from the base model
    since: int
    # uint8 [n, bytes], the packed points of the rounds from ``since + 1`` on that are over, oldest first; see
    # `fedtune_strategies.seed_gradient.coding`
    levels: Tensor
    units: Tensor  # float32 [n], their units
    lr: float  # root mean square by which a step changes the weights, as a share of theirs


@dataclass(frozen=True)
class GradientWeights:
    """A stretch of W_r, for a node that would take longer to add the points of all rounds."""

    kind: ClassVar[str] = "gradient-weights"
    round: int  # the round whose task comes next; the points of all rounds before it are in the weights
    start: int  # number of the first element, of all tuned tensors one after another
    values: Tensor  # float32 [n]
    fingerprint: str  # fingerprint of the whole W_r in float32


@dataclass(frozen=True)
class GradientReply(TrainReply):
    """What a node answers to a `GradientTask`: the point of the round's pool that its steps reached."""

    kind: ClassVar[str] = "gradient-reply"
    levels: Tensor  # uint8, the packed point
    unit: float  # its unit
    skipped: int  # steps left out because their loss was not finite
