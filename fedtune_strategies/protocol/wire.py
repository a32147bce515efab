"""Messages as bytes.

A message is a frozen dataclass of plain numbers, texts, tensors and dicts of tensors. On the wire it is the length of a
header (4 bytes, little endian), the header, and the tensors' elements one after another. The header is a JSON list of
the fields' values in their order; a tensor stands there as its dtype and shape. So a message of 2 kilobytes has 150
bytes of envelope, nothing can be run by reading it, and nothing is allocated that did not arrive.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.protocol.door import admitted, clean
from fedtune_strategies.protocol.handshake import Hello, HelloReply, ModelChunk, ModelManifest, ModelRequest
from fedtune_strategies.protocol.status import Ack, Failure, StateMissing

_LENGTH = 4
_Tensors: TypeAlias = dict[str, Tensor]
_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Message(Protocol):
    """A frozen dataclass whose fields are numbers, texts, tensors and dicts of tensors."""

    kind: ClassVar[str]
    """The name under which it travels, the same on both sides."""


_TYPES: dict[str, type] = {}


def register(*types: type) -> None:
    """Make message types known to `decode`.

    `*types`: frozen dataclasses with a ``kind``; see `Message`.
    Raises `ProtocolError`: another type has that ``kind`` already.
    """
    for cls in types:
        kind = getattr(cls, "kind", "")
        if _TYPES.setdefault(kind, cls) is not cls:
            raise ProtocolError(f"two message types are called '{kind}': {cls.__module__} needs another name.")


register(Hello, HelloReply, ModelRequest, ModelManifest, ModelChunk, Ack, StateMissing, Failure)


def encode(message: Message) -> bytes:
    """Turn a message into bytes.

    `message`: the message; its tensors are on the CPU.
    """
    tensors: list[Tensor] = []

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return [_NAMES[value.dtype], list(value.shape)]
        if isinstance(value, dict):
            return {name: described(tensor) for name, tensor in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    fields = dataclasses.fields(message)  # type: ignore[arg-type]  # every message is a dataclass
    header = json.dumps([described(getattr(message, field.name)) for field in fields], separators=(",", ":")).encode()
    return b"".join([len(header).to_bytes(_LENGTH, "little"), header, *map(_elements, tensors)])


def decode(kind: str, payload: bytes) -> Message:
    """Turn bytes back into a message, checking every field.

    `kind`: the ``kind`` of the expected message type.
    Returns: the message; its tensors are new and writable.
    Raises `ProtocolError`: the kind is unknown, the bytes are damaged, a field is missing, unexpected or of another
        type, or what it holds is not let in: see `door.admitted`.
    """
    cls = _TYPES.get(kind)
    if cls is None:
        raise ProtocolError(
            f"received a message of unknown kind {kind[:40]!r}: run the same FedTune version everywhere."
        )
    try:
        end = _LENGTH + int.from_bytes(payload[:_LENGTH], "little")
        values = json.loads(payload[_LENGTH:end])
        message: Message = cls(**_fields(cls, values, memoryview(payload)[end:]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"received a damaged '{kind}' message: {clean(str(error), 200)}.") from None
    return admitted(message)


def _fields(cls: type, values: Any, data: memoryview) -> dict[str, Any]:
    fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
    if type(values) is not list or len(values) != len(fields):
        raise ValueError(f"its header does not hold {len(fields)} fields")
    found: dict[str, Any] = {}
    rest = data
    for field, value in zip(fields, values, strict=True):
        kind, name = hints[field.name], field.name
        if kind is Tensor:
            found[name], rest = _tensor(value, rest)
        elif kind == _Tensors:
            if type(value) is not dict:
                raise TypeError(f"field '{name}' is {type(value).__name__} instead of tensors")
            found[name] = {}
            for key, described in value.items():
                found[name][key], rest = _tensor(described, rest)
        else:
            found[name] = _plain(name, value, kind)
    if rest:
        raise ValueError(f"{len(rest)} bytes are left over")
    return found


def _plain(name: str, value: Any, kind: type) -> Any:
    if kind is float and (type(value) is int or value in ("nan", "inf", "-inf")):
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"field '{name}' is {type(value).__name__} instead of {kind.__name__}")
    return value


def _tensor(described: Any, data: memoryview) -> tuple[Tensor, memoryview]:
    """Take a tensor off the front of the data; its size was claimed, so it is checked before anything is made."""
    dtype_name, shape = described
    dtype = _DTYPES[dtype_name]
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise TypeError("a tensor's shape is no list of sizes")
    size = math.prod(shape) * dtype.itemsize
    if size > len(data):
        raise ValueError(f"a tensor of {size} bytes has {len(data)}")
    if not size:
        return torch.empty(shape, dtype=dtype), data
    elements = bytearray(data[:size])
    if dtype is torch.bool and max(elements) > 1:  # others would not be what they compare as
        raise ValueError("a truth value is neither 0 nor 1")
    return torch.frombuffer(elements, dtype=dtype).reshape(shape), data[size:]


def _elements(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, which are not copied."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
