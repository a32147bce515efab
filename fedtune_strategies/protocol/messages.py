"""The typed messages between a strategy and a node, and their bytes.

A message is a frozen dataclass of plain numbers, texts, tensors and dicts of tensors. On the wire it is one
safetensors blob: the tensors under their field's name, and the rest as JSON in a tensor named ``header``.
Safetensors carries bfloat16 and int8, needs no pickle and checks its own lengths; `decode` checks everything else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from typing import Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedtune_strategies.errors import ProtocolError

PROTOCOL_VERSION = 3
_HEADER = "header"
_Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Hello:
    """Asks a node who it is; the node loads its model and data to answer.

    Attributes
    ----------
    protocol : int
        `PROTOCOL_VERSION` of the server.
    fingerprint : str
        Fingerprint of the run's base model W_0.
    """

    kind: typing.ClassVar[str] = "hello"
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
        Peak resident memory of the worker so far, in bytes.
    """

    kind: typing.ClassVar[str] = "hello-reply"
    node: str
    protocol: int
    num_examples: int
    fingerprint: str
    peak_memory: int


@dataclass(frozen=True)
class ModelWanted:
    """A node without the run's base model asks for it; see `fedtune_strategies.provision`.

    Attributes
    ----------
    node : str
        Name of the node.
    piece : int
        Number of a piece; -1 for the manifest.
    """

    kind: typing.ClassVar[str] = "model-wanted"
    node: str
    piece: int


@dataclass(frozen=True)
class ModelManifest:
    """Answers a `ModelWanted`: all pieces of the model folder, as JSON."""

    kind: typing.ClassVar[str] = "model-manifest"
    pieces: str


@dataclass(frozen=True)
class ModelPiece:
    """Answers a `ModelWanted`: one piece.

    Attributes
    ----------
    piece : int
        Its number.
    data : Tensor
        uint8, its bytes.
    """

    kind: typing.ClassVar[str] = "model-piece"
    piece: int
    data: Tensor


@dataclass(frozen=True)
class SeedTask:
    """One round of FedKSeed for one node.

    Attributes
    ----------
    round : int
        Round, from 1.
    since : int
        The round whose theta the node must hold from its last task; 0 for the base model, theta = 0.
    change : Tensor
        uint8, packed whole numbers [pools, K]: what was added since then to theta of the pool that was in use, and of
        every later one, in units; see `protocol.packing`.
    unit : float
        Unit of theta, a power of two.
    levels : Tensor
        uint8, packed whole numbers [K]: which of the odds each seed has; empty for uniform draws.
    odds : Tensor
        int16, relative odds of drawing a seed, by level; empty for uniform draws.
    lr : float
        Step size along one direction in this round; 0 where the node shall find one, in the first round.
    eps : float
        Distance of the losses from the weights; 0 as above.
    limit : float
        Largest magnitude of a scalar; larger ones are clipped. Infinite where nothing is known yet.
    """

    kind: typing.ClassVar[str] = "seed-task"
    round: int
    since: int
    change: Tensor
    unit: float
    levels: Tensor
    odds: Tensor
    lr: float
    eps: float
    limit: float


@dataclass(frozen=True)
class SeedReply:
    """What a node answers to a `SeedTask`: scalars alone.

    The seeds need not travel: `fedtune_strategies.draws.draw_seeds` gives them to both sides.

    Attributes
    ----------
    node : str
        Name of the node.
    round : int
        Round of the task.
    scalars : Tensor
        float32, float16 or int8 [tau], projected gradients in the order of the draws, not a number where the loss was
        not finite; see `protocol.packing.read_scalars`.
    unit : float
        Unit of the scalars.
    loss : float
        Mean training loss over the finite steps, nats a token.
    fingerprint : str
        Fingerprint of the rebuilt W(theta) on which the node worked.
    num_examples : int
        Training examples that the node holds.
    seconds : float
        Wall-clock time of the task on the node.
    peak_memory : int
        Peak resident memory of the worker so far, in bytes.
    lr, eps : float
        Step size and distance that the node took: its own where the task left them open.
    noise : float
        Share of error in its slopes, measured in the first round; otherwise not a number. See `calibrate`.
    """

    kind: typing.ClassVar[str] = "seed-reply"
    node: str
    round: int
    scalars: Tensor
    unit: float
    loss: float
    fingerprint: str
    num_examples: int
    seconds: float
    peak_memory: int
    lr: float
    eps: float
    noise: float


@dataclass(frozen=True)
class BlockTask:
    """One turn of FedCyBGD for one node, or one part of what the turn needs.

    Attributes
    ----------
    round : int
        Turn, from 1.
    block : int
        Index of the block to train; -1 to only keep the parts.
    versions : Tensor
        int64 [D], version of every block after the parts are applied.
    exact : dict of str to Tensor
        float32 parameters of the block to train, where the node lacks it; in a part, of the one that it trains next.
    rest : dict of str to Tensor
        Coded parameters of frozen blocks that the node lacks.
    lr : float
        Learning rate of this turn.
    steps : int
        Local steps, 0 for the node's own rule.
    absent : Tensor
        int64, decoder layers that are left out in this turn.
    committed : int
        The last turn of this node that was committed, 0 for none.
    norms : dict of str to Tensor
        float32 norms of inputs by which weights are pruned, where the codec needs them and the node lacks them.
    """

    kind: typing.ClassVar[str] = "block-task"
    round: int
    block: int
    versions: Tensor
    exact: _Tensors
    rest: _Tensors
    lr: float
    steps: int
    absent: Tensor
    committed: int
    norms: _Tensors


@dataclass(frozen=True)
class BlockReply:
    """What a node answers to a `BlockTask`: the change of one block.

    Attributes
    ----------
    node : str
        Name of the node.
    round : int
        Turn of the task.
    block : int
        Index of the trained block.
    base_version : int
        Version of the block from which the node started.
    delta : dict of str to Tensor
        Change of each parameter of the block, coded as ``fedcybgd.upload`` says.
    loss : float
        Mean training loss over the finite steps, nats a token.
    decrease : float
        Mean loss of the first half of them less that of the second.
    grad_norm : float
        Mean norm of the block's gradient.
    steps : int
        Optimiser steps that counted.
    skipped : int
        Steps left out because their loss was not finite.
    fingerprint : str
        Fingerprint of all weights on which the node started the turn.
    num_examples : int
        Training examples that the node holds.
    seconds : float
        Wall-clock time of the task on the node.
    peak_memory : int
        Peak resident memory of the worker so far, in bytes.
    """

    kind: typing.ClassVar[str] = "block-reply"
    node: str
    round: int
    block: int
    base_version: int
    delta: _Tensors
    loss: float
    decrease: float
    grad_norm: float
    steps: int
    skipped: int
    fingerprint: str
    num_examples: int
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class ArraysTask:
    """One round of a method whose global model is a set of tensors: FedAvg, or a method of another package.

    Attributes
    ----------
    round : int
        Round, from 1.
    arrays : dict of str to Tensor
        The global model.
    """

    kind: typing.ClassVar[str] = "arrays-task"
    round: int
    arrays: _Tensors


@dataclass(frozen=True)
class ArraysReply:
    """What a node answers to an `ArraysTask`: the tensors as its local training left them.

    Attributes
    ----------
    node : str
        Name of the node.
    round : int
        Round of the task.
    arrays : dict of str to Tensor
        Same names and shapes as in the task, if the method does not say otherwise.
    loss : float
        Mean training loss, nats a token.
    fingerprint : str
        Fingerprint of the weights on which the node started.
    num_examples : int
        Training examples that the node holds.
    seconds : float
        Wall-clock time of the task on the node.
    peak_memory : int
        Peak resident memory of the worker so far, in bytes.
    """

    kind: typing.ClassVar[str] = "arrays-reply"
    node: str
    round: int
    arrays: _Tensors
    loss: float
    fingerprint: str
    num_examples: int
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Kept:
    """Answers a `BlockTask` that only brought parts."""

    kind: typing.ClassVar[str] = "kept"
    node: str
    round: int


@dataclass(frozen=True)
class Lacking:
    """A node does not hold what the task counts on (its worker was restarted): it holds the base model alone."""

    kind: typing.ClassVar[str] = "lacking"
    node: str
    round: int


@dataclass(frozen=True)
class Failure:
    """A node's error, as one line for the operator.

    Attributes
    ----------
    exit_code : int
        Exit code of the `fedtune_strategies.errors` class.
    message : str
        The line.
    """

    kind: typing.ClassVar[str] = "failure"
    exit_code: int
    message: str


Message: TypeAlias = (
    Hello
    | HelloReply
    | ModelWanted
    | ModelManifest
    | ModelPiece
    | SeedTask
    | SeedReply
    | BlockTask
    | BlockReply
    | ArraysTask
    | ArraysReply
    | Kept
    | Lacking
    | Failure
)
_TYPES: dict[str, type] = {cls.kind: cls for cls in typing.get_args(Message)}


def encode(message: Message) -> bytes:
    """Turn a message into bytes.

    Parameters
    ----------
    message : Message
        One of the dataclasses of this module.

    Returns
    -------
    bytes
        A safetensors blob.
    """
    header: dict[str, Any] = {}
    tensors: _Tensors = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.contiguous()
        elif isinstance(value, dict):
            tensors |= {f"{field.name}/{name}": tensor.contiguous() for name, tensor in value.items()}
        elif isinstance(value, float) and not math.isfinite(value):
            header[field.name] = str(value)
        else:
            header[field.name] = value
    text = json.dumps(header, separators=(",", ":")).encode()
    return safetensors.torch.save({_HEADER: torch.frombuffer(bytearray(text), dtype=torch.uint8), **tensors})


def decode(kind: str, payload: bytes) -> Message:
    """Turn bytes back into a message, checking every field.

    Parameters
    ----------
    kind : str
        The ``kind`` of the expected message type.
    payload : bytes
        What `encode` made.

    Returns
    -------
    Message
        The message; its tensors are new and writable.

    Raises
    ------
    ProtocolError
        The kind is unknown, the blob is damaged, or a field is missing, unexpected or of another type.
    """
    cls = _TYPES.get(kind)
    if cls is None:
        raise ProtocolError(
            f"received a message of unknown kind {kind[:40]!r}: run the same FedTune version everywhere."
        )
    try:
        tensors = safetensors.torch.load(payload)
        header = json.loads(tensors.pop(_HEADER).numpy().tobytes())
        return cls(**_fields(cls, header, tensors))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ProtocolError(f"received a damaged '{kind}' message: {str(error)[:200]}.") from None


def _fields(cls: type, header: Any, tensors: _Tensors) -> dict[str, Any]:
    if not isinstance(header, dict):
        raise TypeError("its header is no table")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], field.name
        if kind is Tensor:
            values[name] = tensors.pop(name)
        elif kind == _Tensors:
            prefix = name + "/"
            values[name] = {
                key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)
            }
        else:
            values[name] = _plain(name, header.pop(name), kind)
    if header or tensors:
        raise ValueError(f"unexpected field '{next(iter([*header, *tensors]))[:40]}'")
    return values


def _plain(name: str, value: Any, kind: type) -> Any:
    if kind is float and (type(value) is int or value in ("nan", "inf", "-inf")):
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"field '{name}' is {type(value).__name__} instead of {kind.__name__}")
    return value
