"""Whole runs of a model in float16: they learn, nothing overflows, and weights are rounded once, where docs say."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fedtune_strategies.fedkseed.packing import read_scalars
from fedtune_strategies.fedkseed.pools import rebuild
from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.model import load_model
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import parse
from tests.federations import run


@pytest.fixture
def settings(settings):
    return settings | {"num-server-rounds": 6, "eval.answers": 0, "model.dtype": "float16"}


def learned(ledger):
    losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
    replies = [protocol.decode(r.body["kind"], ledger.payload(r)) for r in ledger.records("reply")]
    assert len(replies) and np.isfinite([reply.loss for reply in replies]).all()
    assert losses[-1] < losses[0]
    exported = safetensors.torch.load_file(Path(ledger.last("finished").body["model"]) / "model.safetensors")
    return exported, replies


@pytest.mark.slow
def test_fedkseed_rebuilds_16_bit_weights_from_the_base_with_one_rounding(settings, data_files):
    settings |= {"method.name": "fedkseed", "fedkseed.eps": 1e-2, "strategy.min-nodes": 1}
    settings |= {"num-server-rounds": 3, "eval.every": 3}
    ledger = run(settings, {"node-0": data_files["node-0"]})
    exported, replies = learned(ledger)
    assert all(np.isfinite(read_scalars(reply.scalars, reply.unit)).all() for reply in replies)
    theta = safetensors.torch.load(ledger.payload(ledger.last("round")))["theta"].numpy()
    base = base_tensors(load_model(settings["model.name"], "float16"))
    expected = {name: torch.empty_like(value) for name, value in base.items()}
    rebuild(parse(settings), [theta], expected, base)
    for name, value in expected.items():
        assert value.dtype == torch.float16 and torch.equal(exported[name], value)
        full = {name: torch.empty(value.shape)}
        rebuild(parse(settings), [theta], full, {name: base[name].float()})
        assert torch.equal(value, full[name].half())
    assert any(not torch.equal(exported[name], value) for name, value in base.items())


def test_fedcybgd_holds_blocks_in_32_bits_and_rounds_what_it_exports(settings, data_files):
    settings |= {"method.name": "fedcybgd", "train.lr": 1e-2}
    ledger = run(settings, data_files)
    exported, replies = learned(ledger)
    assert all(reply.skipped == 0 and reply.steps == 3 for reply in replies)
    files = {}
    for record in ledger.records("round"):
        files |= record.body["files"]
    trained = {name: value for file in files.values() for name, value in ledger.get_file(file).items()}
    base = base_tensors(load_model(settings["model.name"], "float16"))
    assert trained.keys() == base.keys()  # the rounds visit all blocks
    for name, value in trained.items():
        assert value.dtype == torch.float32 and torch.equal(exported[name], value.half())
    assert any(not torch.equal(value, value.half().float()) for value in trained.values())
