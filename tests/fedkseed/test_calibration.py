"""Step size and distance that the nodes find in the first round."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import assert_resumed_alike, make_nodes, run

AUTO = {"train.lr": "auto", "eval.answers": 0}


def test_a_run_finds_its_step_and_resumes_with_it(settings, data_files, tmp_path, caplog):
    settings |= AUTO | {"strategy.aggregation": "fedadam"}
    caplog.set_level(logging.INFO, "fedtune")
    ledger = run(settings, data_files)
    found = [record.body["lr"] for record in ledger.records("reply")]
    assert len(set(found[:3])) == 3 and set(found[3:]) == {sorted(found[:3])[1]}
    assert "found by 3 nodes: train.lr" in caplog.text
    losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
    assert losses[-1] < losses[0]
    assert_resumed_alike(settings, data_files, tmp_path)


@pytest.mark.parametrize(
    ("change", "kept", "line"),
    [
        ({"lr": 1e30}, 3, "found by 3 nodes"),
        ({"lr": float("nan")}, 2, "node-0 found no step size"),
        ({"noise": 0.93}, 3, "node-0: the signal in its scalars is below the noise: 93 %"),
    ],
)
def test_one_node_cannot_choose_for_all(settings, data_files, caplog, change, kept, line):
    settings |= AUTO | {"num-server-rounds": 1, "strategy.min-nodes": 3, "fedkseed.outlier": 0.0}
    nodes = make_nodes(settings, data_files)
    caplog.set_level(logging.INFO, "fedtune")

    def forged(kind, payload):
        kind, payload = nodes[1].handle(kind, payload)
        message = protocol.decode(kind, payload)
        if isinstance(message, SeedReply):
            message = replace(message, **change)
        return message.kind, protocol.encode(message)

    execute(InMemoryGrid({1: forged, 2: nodes[2].handle, 3: nodes[3].handle}), settings, run_id=1)
    replies = list(Ledger.read(Path(settings["run.dir"])).records("reply"))
    assert len(replies) == kept and line in caplog.text
    lr = float(caplog.text.partition("train.lr = ")[2].split()[0])
    honest = [record.body["lr"] for record in replies if record.node != "node-0"]
    assert min(honest) * 0.99 <= lr <= max(honest) * 1.01


def test_private_runs_must_be_told(settings, data_files):
    with pytest.raises(ConfigError, match=r"must be a number where 'privacy.clip' is set"):
        run(settings | {"train.lr": "auto", "privacy.clip": 1.0}, data_files)
    with pytest.raises(ConfigError, match=r"'train.lr' is 0.0, but must be a number above 0, or 'auto'"):
        run(settings | {"train.lr": 0}, data_files)
