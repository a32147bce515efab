"""Changes that a member should not send: shapes that unpack to gigabytes, sizes out of line."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.blocks.uploads import layout_of
from fedtune_strategies.fedcybgd import strategy as fedcybgd
from fedtune_strategies.fedcybgd.messages import BlockReply
from fedtune_strategies.fedcybgd.screening import largest, out_of_line
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import final_state, make_nodes


@given(st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=31), st.floats(0, 1e9))
def test_a_change_is_out_of_line_above_ten_medians_and_not_below(before, size):
    median = torch.tensor(before, dtype=torch.float64).quantile(0.5).item()
    if abs(size - 10 * median) > 1e-9 * median:
        assert out_of_line(size, before) == (size > 10 * median)


def test_two_changes_say_nothing_yet_and_still_ones_never_do():
    assert not out_of_line(1e6, [1.0, 1.0]) and not out_of_line(1.0, [0.0, 0.0, 0.0])


def test_the_norm_is_of_the_whole_block_in_any_order():
    delta = {"a": torch.randn(300, 7), "b": -torch.full((2,), 9.5), "c": torch.empty(0)}
    mixed = dict(random.sample(sorted(delta.items(), key=lambda pair: pair[0]), 3))
    assert largest(delta) == largest(mixed) == 9.5


def attacked(settings, data_files, change, after=0):
    """Run with a first node that changes its replies once it has sent some honest ones."""
    nodes, sent = make_nodes(settings, data_files), []

    def forged(kind, payload):
        kind, payload = nodes[1].handle(kind, payload)
        message = protocol.decode(kind, payload)
        if isinstance(message, BlockReply):
            sent.append(message.round)
            if len(sent) > after:
                message = change(message)
        return kind, protocol.encode(message)

    execute(InMemoryGrid({1: forged, 2: nodes[2].handle, 3: nodes[3].handle}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    return ledger, [record.body["reason"] for record in ledger.records("refused") if record.round]


@pytest.fixture
def settings(settings):
    return settings | {
        "method.name": "fedcybgd", "eval.data": "", "train.lr": 1e-2, "num-server-rounds": 6, "strategy.min-nodes": 2,
    }  # fmt: skip


BOMB = {
    "kept": torch.zeros(1, dtype=torch.uint8), "values": torch.empty(0), "shape": torch.tensor([2**14, 2**14]),
}  # fmt: skip


@pytest.mark.parametrize(
    "delta",
    [
        {f"model.embed_tokens.weight:{kind}": part for kind, part in BOMB.items()},
        {"model.embed_tokens.weight:nf4": torch.empty(0, dtype=torch.uint8), "model.embed_tokens.weight:scale":
         torch.empty(0), "model.embed_tokens.weight:shape": torch.tensor([2**40])},
        {"model.embed_tokens.weight": torch.zeros(3)},
        {},
    ],
    ids=["one gigabyte", "beyond memory", "another shape", "nothing"],
)  # fmt: skip
def test_a_change_of_another_shape_is_refused_before_it_is_decoded(settings, data_files, delta, monkeypatch):
    decoded = []

    def spy(parts):
        decoded.append(parts)
        return honest(parts)

    honest = fedcybgd.largest
    monkeypatch.setattr(fedcybgd, "largest", spy)
    ledger, reasons = attacked(settings, data_files, lambda reply: replace(reply, delta=delta))
    assert reasons and all("other tensors" in reason for reason in reasons)
    assert ledger.last("round").round == 6
    assert not any(layout_of(parts) == layout_of(delta) for parts in decoded)


def test_a_change_a_million_times_too_large_is_refused_and_the_honest_ones_are_not(settings, data_files):
    def blown_up(reply):
        return replace(reply, delta={name: part * 1e6 for name, part in reply.delta.items()})

    ledger, reasons = attacked(settings, data_files, blown_up, after=1)
    assert reasons and all("10 times what is usual" in reason for reason in reasons)
    assert {record.node for record in ledger.records("refused") if record.round} == {"node-0"}
    assert ledger.last("round").round == 6


@pytest.mark.parametrize("upload", ["float32", "bf16", "int8", "sign"])
def test_no_honest_change_is_refused_over_several_cycles(settings, data_files, upload):
    settings |= {"num-server-rounds": 12, "train.upload": upload, "train.lr-schedule": "cosine", "train.warmup": 0.3}
    _, reasons = attacked(settings, data_files, lambda reply: reply)
    assert reasons == [] and final_state(settings)[0] == 12
