"""Whole runs of federated averaging whose nodes send coded changes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.testing import Killed, killed_after
from fedtune_strategies.fedavg.strategy import ArraysStrategy
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import assert_resumes_exactly, final_state, make_grid, make_nodes, run


@pytest.fixture
def settings(settings):
    return settings | {"method.name": "fedavg", "eval.data": "", "train.lr": 1e-2}


def test_a_run_with_signs_killed_at_any_record_resumes_to_the_same_bits(settings, data_files, tmp_path):
    settings |= {"train.upload": "sign", "num-server-rounds": 2}
    assert_resumes_exactly(settings, data_files, tmp_path, first=7)


def test_a_coded_upload_is_smaller(settings, data_files, tmp_path):
    sizes = []
    for upload in ("float32", "bf16", "int8", "sign"):
        ledger = run(settings | {"train.upload": upload, "run.dir": str(tmp_path / upload)}, data_files)
        sizes.append(sum(record.body["bytes_up"] for record in ledger.records("reply")))
    assert sizes == sorted(sizes, reverse=True)


def test_a_change_of_another_shape_or_not_finite_is_refused(settings, data_files):
    settings |= {"train.upload": "sign", "strategy.min-nodes": 2, "num-server-rounds": 2}
    nodes = make_nodes(settings, data_files)

    def forged(kind, payload):
        kind, payload = nodes[1].handle(kind, payload)
        message = protocol.decode(kind, payload)
        if kind == "arrays-reply":
            if message.round == 1:
                message.arrays["model.embed_tokens.weight:shape"].fill_(2**40)
            else:
                message.arrays["model.embed_tokens.weight:scale"].fill_(torch.inf)
        return kind, protocol.encode(message)

    execute(InMemoryGrid({1: forged, 2: nodes[2].handle, 3: nodes[3].handle}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    reasons = {record.round: record.body["reason"] for record in ledger.records("refused") if record.round}
    assert "other tensors" in reasons[1] and "not finite" in reasons[2]


def test_a_strategy_reads_changes_that_nodes_send_in_a_form_of_its_own(settings, data_files, tmp_path, monkeypatch):
    settings |= {"train.upload": "float32", "num-server-rounds": 1}
    plain = settings | {"run.dir": str(tmp_path / "plain")}
    run(plain, data_files)

    def own_form(node):
        def handle(kind, payload):
            kind, payload = node.handle(kind, payload)
            message = protocol.decode(kind, payload)
            if kind == "arrays-reply":
                halves = {f"{name}.half": value / 2 for name, value in message.arrays.items()}
                message = dataclasses.replace(message, arrays=halves)
            return kind, protocol.encode(message)

        return handle

    def changes(self, reply):
        return {name.removesuffix(".half"): 2 * half for name, half in reply.arrays.items()}

    monkeypatch.setattr(ArraysStrategy, "changes", changes)
    nodes = {number: own_form(node) for number, node in make_nodes(settings, data_files).items()}
    execute(InMemoryGrid(nodes), settings, run_id=1)
    assert final_state(settings) == final_state(plain)


def test_nodes_of_fedzo_find_a_step_size_that_a_stopped_run_keeps(settings, data_files, tmp_path):
    settings |= {"method.name": "fedzo", "train.lr": "auto", "num-server-rounds": 2}
    run(settings, data_files)
    replies = list(Ledger.read(Path(settings["run.dir"])).records("reply"))
    found = [record.body["lr"] for record in replies if record.round == 1]
    assert len(set(found)) > 1 and all(0 < lr < 1 for lr in found)
    assert {record.body["lr"] for record in replies if record.round == 2} == {np.median(found)}
    resumed = settings | {"run.dir": str(tmp_path / "killed")}
    nodes = make_nodes(resumed, data_files)
    with pytest.raises(Killed), killed_after(max(record.seq for record in replies if record.round == 1) + 1):
        execute(make_grid(nodes), resumed, run_id=1)
    execute(make_grid(nodes), resumed, run_id=2)
    assert final_state(resumed) == final_state(settings)
