import dataclasses
import gc
import math
import weakref

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedavg.messages import ArraysReply, ArraysTask
from fedtune_strategies.fedcybgd.messages import BlockReply, BlockTask
from fedtune_strategies.fedkseed.messages import GradientReply, GradientTask, GradientWeights, SeedReply, SeedTask
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.records import (
    INLINE_BYTES,
    for_flower,
    from_record,
    offer_in,
    payload_size,
    to_record,
    with_offer,
)

BYTES = torch.tensor([0, 3, 255], dtype=torch.uint8)
EXAMPLES = [
    protocol.Hello(1, "abcd"),
    protocol.HelloReply("node-0", 1, 5, "abcd", 10),
    SeedTask(3, 1, BYTES, 2.0**-20, BYTES.clone(), torch.arange(1, 17, dtype=torch.int16), 1e-4, 1e-3, math.inf),
    SeedTask(3, 0, BYTES, 2.0**-20, BYTES[:0], torch.empty(0, dtype=torch.int16), 1e-4, 1e-3, math.inf),
    SeedReply("node_0.a-b", 3, 2.5, "abcd", 5, 1.5, 10, torch.tensor([1.0, math.nan]), 1.0, 1e-4, 0.5),
    GradientTask(3, 1, torch.ones(1, 8, dtype=torch.uint8), torch.ones(1), 1e-2),
    GradientWeights(3, 128, torch.ones(4), "ab"),
    GradientReply("n", 3, 2.0, "f", 5, 1.0, 10, torch.ones(2, dtype=torch.uint8), 0.5, 1),
    BlockTask(
        round=2,
        block=1,
        versions=torch.tensor([0, 3]),
        exact={"a.weight": torch.randn(2, 3)},
        frozen={"b:int8": torch.ones(2, dtype=torch.int8)},
        lr=0.1,
        dropped=torch.tensor([2]),
        committed=1,
    ),
    BlockReply("n", 2, 2.0, "f", 5, 1.0, 10, 1, 3, {"a": torch.ones(2, dtype=torch.bfloat16)}, 5, 1),
    ArraysTask(1, {"a.weight": torch.randn(2, 3)}, 1e-3),
    ArraysReply("n", 1, 2.0, "f", 5, 1.0, 10, {"a.weight": torch.randn(2, 3)}, 1),
    protocol.ModelRequest("n", -1),
    protocol.ModelManifest("[]"),
    protocol.ModelChunk(3, torch.ones(4, dtype=torch.uint8)),
    protocol.Ack("n", 1),
    protocol.StateMissing("n", 1),
    protocol.Failure(11, "no such file"),
]


protocol.register(
    SeedTask, SeedReply, GradientTask, GradientWeights, GradientReply, BlockTask, BlockReply, ArraysTask, ArraysReply
)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left.double().nan_to_num(9.5), right.double().nan_to_num(9.5))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
def test_a_message_survives_the_wire(message):
    again = protocol.decode(*from_record(to_record(message.kind, protocol.encode(message))))
    assert type(again) is type(message)
    for field in dataclasses.fields(message):
        assert same(getattr(message, field.name), getattr(again, field.name)), field.name


def test_a_loss_that_is_no_number_survives():
    reply = dataclasses.replace(EXAMPLES[4], loss=math.nan)
    assert math.isnan(protocol.decode(reply.kind, protocol.encode(reply)).loss)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("seed-task", lambda values: values.pop("lr")),
        ("seed-task", lambda values: values.update(lr="high")),
        ("seed-task", lambda values: values.update(round=1.5)),
        ("seed-task", lambda values: values.update(extra=1)),
        ("seed-task", lambda values: values.pop("change")),
        ("nonsense", lambda values: None),
    ],
)
def test_missing_unexpected_and_mistyped_fields_are_refused(kind, change):
    values = vars(EXAMPLES[2]).copy()
    change(values)
    fields = [(name, type(value)) for name, value in values.items()]
    payload = protocol.encode(dataclasses.make_dataclass("Forged", fields)(**values))
    with pytest.raises(ProtocolError) as caught:
        protocol.decode(kind, payload)
    assert "\n" not in str(caught.value)


@given(st.sampled_from([message.kind for message in EXAMPLES]), st.binary(max_size=400))
def test_any_bytes_are_a_message_or_refused(kind, payload):
    with pytest.raises(ProtocolError):
        protocol.decode(kind, payload)


@settings(max_examples=200)
@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_messages_are_refused_or_decode_to_their_type(message, data):
    payload = bytearray(protocol.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for damaged in (bytes(payload), bytes(payload[:cut]), bytes(payload) + b"x"):
        try:
            assert type(protocol.decode(message.kind, damaged)) is type(message)
        except ProtocolError as error:
            assert len(str(error)) < 400


def test_a_payload_goes_with_the_last_who_held_it():
    """It may be a block of the model: none waits until Python looks for circles of objects."""
    gc.disable()
    try:
        content = with_offer(for_flower(to_record("kept", bytes(INLINE_BYTES + 1))), "here")
        assert from_record(content)[0] == "kept" and offer_in(content) == "here"
        gone = weakref.ref(content)
        del content
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [0, 10, INLINE_BYTES, INLINE_BYTES + 1])
def test_payloads_of_any_size_survive_flowers_records(size):
    payload = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    record = for_flower(to_record("kept", payload))
    assert from_record(record) == from_record(to_record("kept", payload)) == ("kept", payload)
    assert payload_size(record) == payload_size(to_record("kept", payload)) == size
    # One object besides its envelope: every further one costs requests of its own.
    assert len(record) == (1 if size <= INLINE_BYTES else 2)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedtune": ConfigRecord({"payload": b""})}),
        RecordDict({"fedtune": ConfigRecord({"kind": 3, "payload": b""})}),
        RecordDict({"fedtune": ConfigRecord({"kind": "kept"})}),
        RecordDict({"fedtune": ConfigRecord({"kind": "kept", "payload": "text"})}),
        RecordDict(
            {"fedtune": ConfigRecord({"kind": "kept"}), "blob": ArrayRecord({"x": Array("u1", (1,), "?", b"")})}
        ),
        RecordDict(
            {"fedtune": ConfigRecord({"kind": "kept"}), "blob": ArrayRecord({"blob": Array("f4", (1,), "?", b"junk")})}
        ),
    ],
)
def test_records_of_others_are_refused(content):
    with pytest.raises(ProtocolError):
        from_record(content)
