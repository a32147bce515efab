"""How a codec is written: ``"int8"``, ``"prune:0.5+nf4"``, ``"drop:2+int8"``. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedtune_strategies.errors import ConfigError

QUANTISATIONS = ("none", "bf16", "int8", "nf4")


@dataclass(frozen=True)
class Codec:
    """How tensors are coded."""

    # what is kept of each value. ``"none"`` keeps the tensor's own dtype and bits; ``"sign"`` is for changes alone
    quantisation: str = "none"
    prune: float = 0.0  # share of each row's elements, those with the lowest scores, that is set to zero and not sent
    # decoder layers that are left out altogether. `encode` does not act on it: whoever chooses the layers
    # (`rest.dropped_layers`) leaves their tensors out
    drop: int = 0


UPLOADS = {"float32": Codec(), "bf16": Codec("bf16"), "int8": Codec("int8"), "sign": Codec("sign")}
"""Coding of a node's change on its way up, by the value of ``train.upload``."""

FEEDBACK = ("int8", "sign")
"""Those of which a node adds what they lose to its next change."""

UPLOAD_WIDTHS = {"float32": 4.0, "bf16": 2.0, "int8": 1.0, "sign": 0.125}
"""Bytes of a value in it, the scales of the rows apart."""


def kept_back_bytes(upload: str, parameters: int) -> int:
    """Bytes of disk in which a node keeps what coding its changes lost, once it has sent a change of them all."""
    return 4 * parameters if upload in FEEDBACK else 0


def coded_bytes(tensors: Iterable[tuple[int, ...]], codec: Codec, width: int) -> float:
    """Bytes of tensors of these shapes in a coding (`fedtune_strategies.blocks.codecs`); `width`: of an exact value."""
    total = 0.0
    for shape in tensors:
        numel = math.prod(shape)
        if len(shape) < 2:
            total += width * numel
            continue
        kept = numel * (1 - codec.prune)
        rows = numel / shape[-1]
        value, scales = {"none": (width, 0.0), "bf16": (2, 0.0), "int8": (1, 4.0 * rows), "nf4": (0.5, kept / 16)}[
            codec.quantisation
        ]
        total += kept * value + scales + (numel / 8 if codec.prune else 0)
    return total


def parse_codec(text: str) -> Codec:
    """Read a codec as written in a configuration: parts joined by ``+``, each kind of part at most once."""
    fields: dict[str, Any] = {}
    for part in text.split("+"):
        found = _parse_part(text, part.strip())
        if not fields.keys().isdisjoint(found):
            raise ConfigError(f"codec {text!r} names its {next(iter(found))} twice; name it once")
        fields |= found
    return Codec(**fields)


def _parse_part(text: str, part: str) -> dict[str, Any]:
    name, _, value = part.partition(":")
    try:
        if part in QUANTISATIONS:
            return {"quantisation": part}
        if name == "prune" and 0.0 < float(value) < 1.0:
            return {"prune": float(value)}
        if name == "drop" and int(value) >= 1:
            return {"drop": int(value)}
    except ValueError:
        pass
    raise ConfigError(
        f"codec {text!r}: {part!r} is not one of {', '.join(QUANTISATIONS)}, prune:S with 0 < S < 1, "
        "drop:N with N >= 1; join several with +, such as prune:0.5+int8"
    )
