"""Messages as bytes.

A message is a frozen dataclass of plain numbers, texts, tensors and dicts of tensors. On the wire it is one
safetensors blob: the tensors under their field's name, and the rest as JSON in a tensor named ``header``.
Safetensors carries bfloat16 and int8, needs no pickle and checks its own lengths; `decode` checks everything else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any, ClassVar, Protocol, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.protocol.handshake import Hello, HelloReply, ModelChunk, ModelManifest, ModelRequest
from fedtune_strategies.protocol.status import Ack, Failure, StateMissing

_HEADER = "header"
_Tensors: TypeAlias = dict[str, Tensor]


class Message(Protocol):
    """A frozen dataclass whose fields are numbers, texts, tensors and dicts of tensors."""

    kind: ClassVar[str]
    """The name under which it travels, the same on both sides."""


_TYPES: dict[str, type] = {}


def register(*types: type) -> None:
    """Make message types known to `decode`.

    Parameters
    ----------
    *types : type
        Frozen dataclasses with a ``kind``; see `Message`.

    Raises
    ------
    ProtocolError
        Another type has that ``kind`` already.
    """
    for cls in types:
        kind = getattr(cls, "kind", "")
        if _TYPES.setdefault(kind, cls) is not cls:
            raise ProtocolError(f"two message types are called '{kind}': {cls.__module__} needs another name.")


register(Hello, HelloReply, ModelRequest, ModelManifest, ModelChunk, Ack, StateMissing, Failure)


def encode(message: Message) -> bytes:
    """Turn a message into bytes.

    Parameters
    ----------
    message : Message
        The message.

    Returns
    -------
    bytes
        A safetensors blob.
    """
    header: dict[str, Any] = {}
    tensors: _Tensors = {}
    for field in dataclasses.fields(message):  # type: ignore[arg-type]  # every message is a dataclass
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
