"""How a node introduces itself, and gets the base model where it lacks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

PROTOCOL_VERSION = 5


@dataclass(frozen=True)
class Hello:
    """Asks a node who it is; the node reads its data and its model's files to answer, and loads no weights."""

    kind: ClassVar[str] = "hello"
    protocol: int  # `PROTOCOL_VERSION` of the server
    fingerprint: str  # fingerprint of the run's base model W_0


@dataclass(frozen=True)
class HelloReply:
    """A node introduces itself."""

    kind: ClassVar[str] = "hello-reply"
    node: str  # the node's name, unique in a run
    protocol: int  # `PROTOCOL_VERSION` of the node
    num_examples: int  # training examples that the node holds
    fingerprint: str  # fingerprint of the node's base model W_0
    peak_memory: int  # peak memory of the worker so far in bytes, without mapped files


@dataclass(frozen=True)
class ModelRequest:
    """A node without the run's base model asks for it; see `fedtune_strategies.model_transfer`."""

    kind: ClassVar[str] = "model-request"
    node: str  # name of the node
    chunk: int  # number of a chunk; -1 for the manifest


@dataclass(frozen=True)
class ModelManifest:
    """Answers a `ModelRequest`: all chunks of the model folder, as JSON."""

    kind: ClassVar[str] = "model-manifest"
    chunks: str


@dataclass(frozen=True)
class ModelChunk:
    """Answers a `ModelRequest`: one chunk."""

    kind: ClassVar[str] = "model-chunk"
    chunk: int  # its number
    data: Tensor  # uint8, its bytes
