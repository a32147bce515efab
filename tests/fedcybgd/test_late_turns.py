"""FedCyBGD's turns that come after another node's of the same block: refused or rebased, and never twice."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deploy.testing import Killed, killed_after
from fedtune_strategies.blocks.codecs import decode
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.replay import replay
from server_app.run import execute
from tests.federations import final_state, make_nodes, run
from tests.models import CONFIGS, make_model, make_tokenizer

GAMMA, WEIGHT = 0.8, 0.5


class LateGrid(InMemoryGrid):
    """A federation in which one node is at work in round 2 until a later one, and hears nothing meanwhile.

    Parameters
    ----------
    settings, data_files
        As for `tests.federations.run`.
    victim : int
        The node's number.
    until : int
        The round in which its reply comes.
    begun : bool
        Whether that round's tasks are under way by then.
    hears : bool
        Whether it answers whatever comes after the one task.
    """

    def __init__(self, settings, data_files, victim=2, until=3, begun=False, hears=False):
        nodes = make_nodes(settings, data_files)
        super().__init__({number: node.handle for number, node in nodes.items()})
        self._folder, self._victim, self._hears = Path(settings["run.dir"]), victim, hears
        self._until, self._begun = until, begun
        self._held, self._at_work, self._over = {}, False, False

    def get_node_ids(self):
        if not self._begun:
            committed = Ledger.read(self._folder).last("round")
            self._release(committed is not None and committed.round >= self._until - 1)
        return super().get_node_ids()

    def _answer(self, message):
        message_id = super()._answer(message)
        mine, group = message.metadata.dst_node_id == self._victim, message.metadata.group_id
        self._release(self._begun and group == str(self._until))
        first = mine and group == "2" and not self._at_work
        self._at_work = self._at_work or first
        if not self._over and (first or (mine and self._at_work and not self._hears)):
            self._held[message_id] = self._replies.pop(message_id)
        return message_id

    def _release(self, now):
        self._over = self._over or now
        if self._over:
            self._replies |= self._held
            self._held = {}


@pytest.fixture
def settings(settings):
    return settings | {
        "method.name": "fedcybgd",
        "num-server-rounds": 4,
        "strategy.min-nodes": 2,
        "strategy.late": WEIGHT,
        "strategy.server-lr": GAMMA,
        "train.local-steps": 2,
        "fedcybgd.rest": "bf16",
        "round.deadline": 0.1,
        "eval.data": "",
    }


def late_run(settings, data_files, **when):
    execute(LateGrid(settings, data_files, **when), settings, run_id=1)
    return Ledger.read(Path(settings["run.dir"]))


def block(ledger, round, label):
    return ledger.get_file(next(ledger.records("round", round=round)).body["files"][label])


def turn_of(ledger, node, round):
    """The late reply and the round in which it counts."""
    (record,) = [one for one in ledger.records("reply") if (one.node, one.body["round"]) == (node, round)]
    return protocol.decode("block-reply", ledger.payload(record)), record


@pytest.mark.parametrize("begun", [False, True])
def test_a_stale_turn_enters_the_block_as_it_is_by_its_weight(settings, data_files, begun):
    ledger = late_run(settings, data_files, begun=begun)
    reply, record = turn_of(ledger, "node-1", 2)
    assert (record.round, reply.block, reply.base_version) == (3, 1, 0)
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    names = find_blocks(base)[1].parameters
    old, now, new = base.state_dict(), block(ledger, 2, "block-1"), block(ledger, 3, "block-1")
    for name in names:
        moved = GAMMA * decode(reply.delta)[name]
        assert not torch.equal(moved, now[name] - old[name])
        torch.testing.assert_close(new[name], now[name] + WEIGHT * moved, rtol=0, atol=1e-6)
    assert next(ledger.records("round", round=3)).body["metrics"]["blocks"] == [1, 2]
    # Its own replies, and nothing else, make the recorded model.
    assert replay(Path(settings["run.dir"])).kept == sum(1 for _ in ledger.records("reply"))


def test_a_stale_turn_is_refused_without_a_weight(settings, data_files):
    ledger = late_run(settings | {"strategy.late": 0.0}, data_files)
    assert [record.body["metrics"]["blocks"] for record in ledger.records("round")] == [[0], [1], [2], [3]]
    (late,) = ledger.records("late")
    assert late.node == "node-1" and "its round was over" in late.body["reason"]


def test_a_turn_two_rounds_late_is_refused(settings, data_files):
    ledger = late_run(settings, data_files, until=4)
    assert [record.body["metrics"]["blocks"] for record in ledger.records("round")] == [[0], [1], [2], [3]]
    assert [record.node for record in ledger.records("late")] == ["node-1"]


@pytest.mark.parametrize("upload", ["float32", "int8"])
def test_its_node_goes_on_with_what_the_others_have(settings, data_files, upload):
    settings |= {"num-server-rounds": 10, "train.upload": upload}
    ledger = late_run(settings, data_files)
    turns = [(one.round, one.body["block"]) for one in ledger.records("reply") if one.node == "node-1"]
    assert len(turns) >= 3 and turns[0] == (3, 1)
    assert not [one for one in ledger.records("refused")]


def test_a_server_killed_after_it_came_ends_in_the_same_bits(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 3}
    ledger = late_run(settings, data_files)
    came, end = turn_of(ledger, "node-1", 2)[1].seq, sum(1 for _ in ledger.records())
    for last in range(came, end):
        killed = settings | {"run.dir": str(tmp_path / f"killed-{last}")}
        grid = LateGrid(killed, data_files)
        with pytest.raises(Killed), killed_after(last):
            execute(grid, killed, run_id=1)
        execute(grid, killed, run_id=2)
        assert final_state(killed) == final_state(settings), f"killed after record {last}"


def test_a_late_turn_that_nobody_else_was_given_is_the_turn(settings, data_files, tmp_path):
    quiet = settings | {"run.dir": str(tmp_path / "quiet")}
    run(quiet, data_files)
    ledger = late_run(settings, data_files, until=2)
    assert turn_of(ledger, "node-1", 2)[1].round == 2
    assert final_state(settings) == final_state(quiet)


def test_a_late_change_of_the_newest_version_is_a_change_like_others(settings, data_files, tmp_path):
    """Two blocks from one snapshot; one comes late, before it was given to another node."""
    model = make_model(LlamaConfig(**(CONFIGS["llama"].to_dict() | {"num_hidden_layers": 3})))
    model.save_pretrained(tmp_path / "deep")
    make_tokenizer().save_pretrained(tmp_path / "deep")
    settings |= {"model.name": str(tmp_path / "deep")}  # five blocks: the cycle's last round has a node to spare
    settings |= {"fedcybgd.structure": "parallel", "fedcybgd.nodes-per-round": 2}
    ledger = late_run(settings | {"num-server-rounds": 3}, data_files)
    reply, record = turn_of(ledger, "node-1", 2)
    replies = [protocol.decode("block-reply", ledger.payload(one)) for one in ledger.records("reply", round=3)]
    group = [one for one in replies if one.block == reply.block]
    assert record.round == 3 and len(group) == 2  # it was owed, so another node has trained it in round 3
    total = sum(one.num_examples for one in group)
    old = AutoModelForCausalLM.from_pretrained(settings["model.name"]).state_dict()
    new = block(ledger, 3, f"block-{reply.block}")
    for name, value in new.items():
        mean = sum(decode(one.delta)[name] * (one.num_examples / total) for one in group)
        torch.testing.assert_close(value, old[name] + GAMMA * mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["fedcybgd", "fedkseed"])
def test_a_turn_that_was_done_again_does_not_count_twice(settings, data_files, method, tmp_path):
    """The one node misses its deadline, is asked again and answers; then its first answer comes."""
    settings |= {"method.name": method, "strategy.min-nodes": 1}
    one, quiet = {"node-0": data_files["node-0"]}, settings | {"run.dir": str(tmp_path / "quiet")}
    run(quiet, one)
    ledger = late_run(settings, one, victim=1, hears=True)
    (late,) = ledger.records("late")
    assert late.round == 3 and "answered for this round already" in late.body["reason"]
    assert final_state(settings) == final_state(quiet)
