"""A message as Flower carries it: its kind and one opaque payload.

Flower moves every object of a record by its own request, so all of a message is packed into one: bytes in a
``ConfigRecord``, which are the fewest on the wire. What goes by Flower and is longer than `INLINE_BYTES` becomes one
uint8 ``Array`` instead, which Flower cuts into chunks.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune_strategies.errors import ProtocolError

INLINE_BYTES = 4 * 2**20
_RECORD = "fedtune"
_BLOB = "blob"
_OFFER = "stream"


def to_record(kind: str, payload: bytes) -> RecordDict:
    """Wrap a payload for a Grid.

    `kind`: name of the message type, see `fedtune_strategies.protocol.messages`.
    `payload`: the encoded message; it is not copied.
    Returns: a record with one object besides its envelope.
    """
    return RecordDict({_RECORD: ConfigRecord({"kind": kind, "payload": payload})})


def for_flower(content: RecordDict) -> RecordDict:
    """Return the same message as Flower carries it best; what did not come from `to_record` stays as it is."""
    record = _config(content, _RECORD)
    payload = record.get("payload") if record is not None else None
    if record is None or not isinstance(payload, bytes) or len(payload) <= INLINE_BYTES:
        return content
    blob = ArrayRecord({_BLOB: Array(np.frombuffer(payload, dtype=np.uint8))})
    return RecordDict({**content, _RECORD: ConfigRecord({"kind": record["kind"]}), _BLOB: blob})


def from_record(content: RecordDict) -> tuple[str, bytes]:
    """Take kind and payload out of a Flower record.

    `content`: the content of a received message.
    Raises `ProtocolError`: the record is not one that `to_record` makes.
    """
    record = _own(content)
    payload = record.get("payload")
    return str(record["kind"]), payload if isinstance(payload, bytes) else _blob(content)


def payload_size(content: RecordDict) -> int:
    """Return the bytes of a payload of `to_record`, also where Flower carries it, without reading it."""
    payload = _own(content).get("payload")
    return len(payload) if isinstance(payload, bytes) else math.prod(cast(ArrayRecord, content[_BLOB])[_BLOB].shape)


def with_offer(content: RecordDict, offer: str) -> RecordDict:
    """Return a message's content with an offer of a stream beside it, see `fedtune_strategies.stream.offer`."""
    return RecordDict({**content, _OFFER: ConfigRecord({"offer": offer})})


def offer_in(content: RecordDict) -> str:
    """Return the offer of a stream that came with a message; empty where none did."""
    record = _config(content, _OFFER)
    offer = record.get("offer") if record is not None else None
    return offer if isinstance(offer, str) else ""


def _own(content: RecordDict) -> ConfigRecord:
    record = _config(content, _RECORD)
    if record is None or not isinstance(record.get("kind"), str):
        raise ProtocolError("received a message that is not FedTune's: run the same FedTune version on both sides.")
    return record


def _config(content: RecordDict, name: str) -> ConfigRecord | None:
    # Not by `config_records`: what that makes and the content hold each other, and so the payload, until Python looks
    # for such circles, which it does by the number of objects and not by their size.
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else None


def _blob(content: RecordDict) -> bytes:
    try:
        blob = cast(ArrayRecord, content[_BLOB])[_BLOB].numpy()
    except Exception as error:  # Flower raises what its decoder does: a peer may send anything
        raise ProtocolError(f"received a message without a readable payload ({type(error).__name__}).") from None
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise ProtocolError(f"received a payload of type {blob.dtype} and {blob.ndim} axes instead of bytes.")
    return blob.tobytes()
