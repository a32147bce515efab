"""A growing subspace in whole runs: resumed, restarted, joined late, exported; always the same bits."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fedtune_strategies.fedkseed.messages import SeedTask
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint, tuned_parameters
from fedtune_strategies.testing import InMemoryGrid
from server_app.export import export_round
from server_app.ledger import Ledger
from server_app.replay import replay
from server_app.run import execute
from tests.federations import assert_resumed_alike, final_state, make_grid, make_nodes, run


@pytest.fixture
def growing(settings):
    """Five rounds with a fresh pool every two."""
    return settings | {"num-server-rounds": 5, "fedkseed.pool-every": 2, "eval.answers": 0, "train.lr": 3e-3}


def test_a_run_stopped_as_a_pool_is_closed_goes_on_to_the_same_bits(growing, data_files, tmp_path):
    growing |= {"method.name": "fedkseed-pro", "strategy.aggregation": "fedadam"}
    run(growing, data_files)
    assert_resumed_alike(growing, data_files, tmp_path, first=2)
    assert [len(files) for files in final_state(growing)[2]] == [0, 1, 1, 1, 1]


def test_workers_that_restart_and_nodes_that_join_late_rebuild_all_pools(growing, data_files, tmp_path):
    run(growing, data_files)
    forgetful = growing | {"run.dir": str(tmp_path / "forgetful")}
    nodes = make_nodes(forgetful, data_files)

    def restarted(number):
        def handle(kind, payload):
            if kind != "hello":
                nodes[number] = make_nodes(forgetful, data_files)[number]
            return nodes[number].handle(kind, payload)

        return handle

    execute(InMemoryGrid({number: restarted(number) for number in nodes}), forgetful, run_id=1)
    assert final_state(forgetful) == final_state(growing)

    late = growing | {"run.dir": str(tmp_path / "late"), "strategy.min-nodes": 2}
    nodes = make_nodes(late, data_files)
    grid = make_grid({number: nodes[number] for number in (1, 2)})
    newcomer = make_grid({3: nodes[3]}).nodes[3]

    def joining(kind, payload):
        message = protocol.decode(kind, payload)
        if isinstance(message, SeedTask) and message.round == 4:
            grid.nodes[3] = newcomer
        return nodes[1].handle(kind, payload)

    grid.nodes[1] = joining
    execute(grid, late, run_id=1)
    ledger = Ledger.read(Path(late["run.dir"]))
    assert [record.round for record in ledger.records("reply") if record.node == "node-2"] == [5]
    assert not [record for record in ledger.records("refused") if record.round]


def test_every_round_can_be_exported_as_it_was_evaluated(growing, data_files, tmp_path):
    ledger = run(growing | {"model.dtype": "bfloat16"}, data_files)
    evaluated = {record.round: record.body["fingerprint"] for record in ledger.records("evaluation")}
    assert len(set(evaluated.values())) == 6
    for round in (2, 5):
        export_round(Path(growing["run.dir"]), round, tmp_path / f"round-{round}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"round-{round}", dtype="bfloat16")
        assert fingerprint(tuned_parameters(model)) == evaluated[round]


def test_a_replay_that_leaves_out_a_whole_round_keeps_every_pool_in_its_place(
    growing, data_files, tmp_path, monkeypatch
):
    growing |= {"fedkseed.pool-every": 1, "num-server-rounds": 3, "strategy.min-nodes": 2}
    nodes = make_nodes(growing, data_files)

    def fails_in_round_2(number):
        def handle(kind, payload):
            if getattr(protocol.decode(kind, payload), "round", 0) == 2:
                raise RuntimeError("power cut")
            return nodes[number].handle(kind, payload)

        return handle

    grid = {1: fails_in_round_2(1), 2: fails_in_round_2(2), 3: nodes[3].handle}
    execute(InMemoryGrid(grid), growing, run_id=1)
    pools, materialise = [], FedKSeed.materialise

    def spy(self, arrays, parameters):
        pools.append(self.closed)
        return materialise(self, arrays, parameters)

    monkeypatch.setattr(FedKSeed, "materialise", spy)
    replay(Path(growing["run.dir"]), without=["node-2"], out=tmp_path / "without")
    recorded, without = pools
    assert [bool(pool.any()) for pool in recorded] == [True, True, True]
    assert [bool(pool.any()) for pool in without] == [True, False, True]
