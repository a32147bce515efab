"""How a node introduces itself, and gets the base model where it lacks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

PROTOCOL_VERSION = 5


@dataclass(frozen=True)
class Hello:
    """Asks a node who it is; the node reads its data and its model's files to answer, and loads no weights.

    Attributes
    ----------
    protocol : int
        `PROTOCOL_VERSION` of the server.
    fingerprint : str
        Fingerprint of the run's base model W_0.
    """

    kind: ClassVar[str] = "hello"
    protocol: int
    fingerprint: str


@dataclass(frozen=True)
class HelloReply:
    """A node introduces itself.

    Attributes
    ----------
    node : str
        The node's name, unique in a run.
    protocol : int
        `PROTOCOL_VERSION` of the node.
    num_examples : int
        Training examples that the node holds.
    fingerprint : str
        Fingerprint of the node's base model W_0.
    peak_memory : int
        Peak memory of the worker so far in bytes, without mapped files.
    """

    kind: ClassVar[str] = "hello-reply"
    node: str
    protocol: int
    num_examples: int
    fingerprint: str
    peak_memory: int


@dataclass(frozen=True)
class ModelRequest:
    """A node without the run's base model asks for it; see `fedtune_strategies.model_transfer`.

    Attributes
    ----------
    node : str
        Name of the node.
    chunk : int
        Number of a chunk; -1 for the manifest.
    """

    kind: ClassVar[str] = "model-request"
    node: str
    chunk: int


@dataclass(frozen=True)
class ModelManifest:
    """Answers a `ModelRequest`: all chunks of the model folder, as JSON."""

    kind: ClassVar[str] = "model-manifest"
    chunks: str


@dataclass(frozen=True)
class ModelChunk:
    """Answers a `ModelRequest`: one chunk.

    Attributes
    ----------
    chunk : int
        Its number.
    data : Tensor
        uint8, its bytes.
    """

    kind: ClassVar[str] = "model-chunk"
    chunk: int
    data: Tensor
