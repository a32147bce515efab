"""What a run will cost a node, before anybody trains: the terms in which every method says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PROCESS = 480 * 10**6  # bytes: a worker with torch and transformers imported, without a model
ENVELOPE = 13_400  # bytes: what Flower adds to one task and its reply over gRPC, TLS included (docs/LOG.md)
PROCESSES = 570 * 10**6  # bytes: join, Flower's SuperNode and executor, and a message's process, without mapped files
HEADER = 142  # bytes: names, numbers and fingerprint of one message of ours
RESPONSE = 0.5  # part of a sequence for which logits are computed: a guess, it depends on the data


@dataclass(frozen=True)
class Shape:
    """A model as the formulas need it.

    Attributes
    ----------
    parameters : int
        P; tied ones count once.
    layers, hidden, inner, vocabulary : int
        Decoder layers, width, width within an MLP, tokens.
    model : nn.Module
        The model's structure on the meta device, without weights; not to be changed.
    stored : int
        Bytes of the weight files.
    width : int
        Bytes of one parameter in memory.
    weights : int
        Bytes of all in memory, with those that ``model.base`` codes.
    """

    parameters: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    model: nn.Module
    stored: int
    width: int
    weights: int

    def activations(self, tokens: int) -> int:
        """Bytes that a forward pass holds at once."""
        return 4 * tokens * (8 * self.hidden + 4 * self.inner) + self.logits(tokens)

    def kept_activations(self, tokens: int, layers: int) -> int:
        """Bytes that a forward pass keeps for a backward pass through so many layers."""
        # A token, layer and unit of width: 25 values, measured on Llamas. The 17 of arXiv 2205.05198, equation 2, are
        # without attention matrices and for an MLP of two matrices.
        return 25 * self.width * tokens * self.hidden * layers + self.logits(tokens)

    def logits(self, tokens: int) -> int:
        """Bytes of the logits of the responses."""
        return round(RESPONSE * tokens * self.vocabulary * (self.width + 4))


@dataclass(frozen=True)
class Fleet:
    """Who takes part.

    Attributes
    ----------
    nodes : int
        Number of nodes.
    examples : int
        Examples that each of them holds.
    """

    nodes: int
    examples: int


@dataclass(frozen=True)
class Cost:
    """What a node needs.

    Attributes
    ----------
    memory, disk : int
        Bytes: of the worker; of the base model.
    up, down : int
        Bytes of payload a node and round, on average over nodes and rounds, Flower's envelope not included.
    record, replies : int
        Bytes that a round adds to the server's record of the run: for good; of replies, which `run.prune` removes.
    flop : float
        Floating-point operations of a task, of full sequences.
    tasks : float
        Messages a node and round.
    largest : int
        Bytes of the largest reply; 0 where each has `up` of them.
    """

    memory: int
    disk: int
    up: int
    down: int
    record: int
    replies: int = 0
    flop: float = 0.0
    tasks: float = 1.0
    largest: int = 0

    def record_bytes(self, rounds: int, prune: bool = False) -> int:
        """Bytes of the server's record after so many rounds."""
        return rounds * (self.record + (0 if prune else self.replies))

    def link_seconds(self, bits: float) -> float:
        """Seconds on the wire a round at so many bits a second each way."""
        return 8 * (self.up + self.down + self.tasks * ENVELOPE) / bits
