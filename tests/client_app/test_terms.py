"""On what terms a node takes part: each test asks as an operator would who wants more than was agreed to."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from client_app.history import AGREED, LEFT, History
from client_app.node import Node
from client_app.terms import Agreement, Spent, agreement_to, beyond
from client_app.worker import Service
from client_app.worker_client import WorkerSpec
from fedtune_strategies.config.node import ALL, NONE, Terms
from fedtune_strategies.errors import DataError, ResourceError, TermsError
from fedtune_strategies.fedkseed.messages import SeedReply, SeedTask
from fedtune_strategies.fedkseed.packing import pack
from fedtune_strategies.installed import installed_methods
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import parse
from fedtune_strategies.testing import InMemoryGrid
from server_app.run import execute
from tests.federations import final_state, make_grid
from tests.models import make_tokenizer

NOTHING = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int16)


def seed_task(round=1, units=0):
    return SeedTask(round, 0, pack(np.full(64, units, np.int32)), 2.0**-24, *NOTHING, 1e-3, 1e-3, np.inf)


def ask(node, message):
    return protocol.decode(*node.handle(message.kind, protocol.encode(message)))


@pytest.fixture
def own(data_files, tmp_path):
    """The configuration of a node whose owner has agreed to nothing yet."""
    return {"data": str(data_files["node-0"]), "name": "node-0", "folder": str(tmp_path / "own"), "terms.methods": NONE}


@pytest.fixture
def agreed(own, settings):
    """The owner of that node has agreed to the run of `settings`."""
    History(own_folder(own)).agree(agreement_to(parse(settings)))
    return own


def own_folder(own):
    return Path(own["folder"])


def refused(settings, own):
    """Ask a node to take part in a run; returns why it does not. Its data cannot be read: none are touched."""
    with pytest.raises(TermsError) as error:
        Node(settings, own | {"data": "/no/such/file"}, 1)
    return str(error.value)


def test_a_node_whose_owner_agreed_to_nothing_takes_part_in_nothing(settings, own):
    assert "its owner must agree first: no run was agreed to yet" in refused(settings, own)


def test_what_was_agreed_to_runs_to_the_bits_of_a_run_without_terms(settings, agreed, tmp_path):
    execute(make_grid({1: Node(settings, agreed | {"draw-key": "public"}, 1)}), settings | {"strategy.min-nodes": 1}, 1)
    free = settings | {"run.dir": str(tmp_path / "free"), "strategy.min-nodes": 1}
    execute(make_grid({1: Node(free, {"name": "node-0", "data": agreed["data"]}, 1)}), free, 1)
    assert final_state(settings) == final_state(free)


WIDER = [
    ({"method.name": "fedavg"}, "the run's method is fedavg, agreed was fedkseed"),
    ({"train.batch-size": 1}, "batches of 1, agreed were at least 2"),
    ({"train.parameters": "embed"}, "tunes 'embed' of the parameters, agreed was 'all'"),
    ({"train.local-steps": 7}, "asks for 7 local steps, agreed were at most 6"),
    ({"num-server-rounds": 4}, "asks for 4 rounds, agreed were at most 3"),
    ({"train.seq-length": 8}, "'train.seq-length' to 8, agreed was 32"),
    ({"train.batch-size": 512}, "'train.batch-size' to 512, agreed was 2"),
    ({"fedkseed.directions": 6}, "'fedkseed.directions' to 6, agreed was 1"),
    ({"fedkseed.estimator": "gradient"}, "'fedkseed.estimator' to 'gradient'"),
]


@pytest.mark.parametrize(("changes", "line"), WIDER, ids=lambda value: str(value)[:40])
def test_a_run_that_asks_for_more_is_refused_by_name_before_data_are_touched(settings, agreed, changes, line):
    wider = dict(settings | changes)
    if changes.get("fedkseed.estimator") == "gradient":
        wider["train.local-steps"] = 2
    assert line in refused(wider, agreed)
    waiting = History(own_folder(agreed)).waiting()
    assert any(line in reason for reason in waiting["reasons"])
    # What waits is what was asked: who agrees to it, agrees to this run.
    History(own_folder(agreed)).agree(agreement_to(parse(waiting["config"])))
    with pytest.raises(DataError):
        Node(wider, agreed | {"data": "/no/such/file"}, 1)


@pytest.mark.parametrize("changes", [{"method.name": "fedavg"}, {"train.batch-size": 1}], ids=str)
def test_an_operator_s_run_gets_nothing_from_a_worker_whose_owner_agreed_to_another(settings, agreed, changes):
    wider = settings | changes | {"strategy.min-nodes": 1, "round.node-wait": 0.2}
    worker = Service(WorkerSpec(dict(wider), agreed, 1))
    with pytest.raises(TermsError, match="its owner must agree first"):
        execute(InMemoryGrid({1: worker.do}), wider, run_id=1)
    left = [row for row in History(own_folder(agreed)).rows() if row["event"] == LEFT]
    assert {row["kind"] for row in left} == {"failure"} and max(row["bytes"] for row in left) < 300


NARROWER = [
    {"train.local-steps": 2}, {"num-server-rounds": 1}, {"train.lr": 1e-5}, {"train.seed": 9},
    {"stream.listen": "host:1"}, {"strategy.weighting": "uniform"}, {"eval.answers": 0}, {"round.deadline": 9.0},
]  # fmt: skip


@pytest.mark.parametrize("changes", NARROWER, ids=str)
def test_a_run_within_the_agreement_is_not_asked_about(settings, agreed, changes):
    with pytest.raises(DataError):
        Node(settings | changes, agreed | {"data": "/no/such/file"}, 1)


def test_noise_that_was_agreed_to_is_the_least(settings, own):
    private = settings | {"privacy.clip": 1.0, "privacy.noise-multiplier": 2.0, "fedkseed.eps": 1e-3}
    History(own_folder(own)).agree(agreement_to(parse(private)))
    assert "noise is 1.5, agreed was at least 2" in refused(private | {"privacy.noise-multiplier": 1.5}, own)
    assert "noise is 0, agreed was at least 2" in refused(settings, own)
    with pytest.raises(DataError):
        Node(private | {"privacy.noise-multiplier": 3.0}, own | {"data": "/no/such/file"}, 1)


@pytest.mark.parametrize("name", installed_methods())
def test_every_method_is_within_the_agreement_to_it_and_outside_of_any_other(name):
    runs = {one: parse({"method.name": one}) for one in installed_methods()}
    agreement = agreement_to(runs[name])
    assert beyond(agreement, runs[name], Spent()) == []
    assert all(beyond(agreement, run, Spent()) for other, run in runs.items() if other != name)


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 64), st.integers(1, 64), st.integers(0, 9), st.integers(0, 9)
)
def test_terms_by_hand_bound_what_they_name_and_nothing_else(
    rounds, asked_rounds, batch, asked_batch, steps, asked_steps
):
    config = parse(
        {"num-server-rounds": asked_rounds, "train.batch-size": asked_batch, "train.local-steps": max(1, asked_steps)}
    )
    found = beyond(Agreement(Terms(rounds=rounds, batch=batch, steps=steps)), config, Spent())
    wider = [asked_rounds > rounds, asked_batch < batch, 0 < steps < asked_steps]
    assert len(found) == sum(wider)


def test_plain_flower_nodes_take_terms_as_keys_and_have_none_by_default(settings, data_files):
    own = {"data": str(data_files["node-0"]), "name": "node-0"}
    assert isinstance(ask(Node(settings, own, 1), seed_task()), SeedReply)
    bound = own | {"terms.methods": "fedkseed, fedcybgd", "terms.batch": "8", "terms.parameters": ALL}
    assert "batches of 2, agreed were at least 8" in refused(settings, bound)
    assert "the run's method is fedavg, agreed was fedkseed, fedcybgd" in refused(
        settings | {"method.name": "fedavg"}, bound
    )


def test_a_reply_larger_than_agreed_does_not_leave(settings, data_files):
    node = Node(settings, {"data": str(data_files["node-0"]), "terms.bytes": 100}, 1)
    failure = ask(node, seed_task())
    assert isinstance(failure, protocol.Failure) and failure.exit_code == TermsError.exit_code
    assert "agreed were at most 100" in failure.message
    assert [row["kind"] for row in node.history.rows() if row["event"] == LEFT] == ["failure"]


def test_rounds_are_counted_over_tasks_and_runs_and_restarts(settings, agreed):
    """Who asks for one round again and again, with other weights, gets twice the rounds that were agreed to."""
    node = Node(settings, agreed, 1)
    assert isinstance(ask(node, seed_task(4)), protocol.Failure)  # a round that the run does not have
    for number in range(6):
        if number == 3:
            node = Node(settings, agreed, 1)
        assert isinstance(ask(node, seed_task(1, units=number)), SeedReply)
    assert "6 answers have left, agreed were 3 rounds" in ask(node, seed_task(1, units=9)).message
    History(own_folder(agreed)).agree(agreement_to(parse(settings)))
    assert isinstance(ask(node, seed_task(1)), SeedReply)
    # Another run counts on: of the three rounds one is spent.
    assert "3 rounds, agreed were at most 3, 1 of them spent on other runs" in refused(
        settings | {"run.dir": "/another"}, agreed
    )


def test_another_base_model_than_the_first_is_refused(settings, agreed, tmp_path):
    Node(settings, agreed, 1)
    other = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    next(other.parameters()).data += 1.0
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(TermsError, match="base model has the fingerprint"):
        Node(settings | {"model.name": str(tmp_path / "other")}, agreed, 1)


def test_all_that_leaves_is_written_down_for_the_owner_alone(settings, agreed):
    node = Node(settings, agreed, 1)
    sizes = [len(node.handle(m.kind, protocol.encode(m))[1]) for m in (protocol.Hello(1, "x"), seed_task(1))]
    file = own_folder(agreed) / "history.jsonl"
    left = [row for row in History(own_folder(agreed)).rows() if row["event"] == LEFT]
    assert [(row["run"], row["round"], row["method"], row["kind"]) for row in left] == [
        ("run", 0, "fedkseed", "hello-reply"), ("run", 1, "fedkseed", "seed-reply"),
    ]  # fmt: skip
    assert [row["bytes"] for row in left] == sizes and [row["result"] for row in left] == [False, True]
    assert {stat.S_IMODE(one.stat().st_mode) for one in (file, file.with_name("draw.key"))} == {0o600}


def test_what_cannot_be_written_down_does_not_leave(settings, agreed):
    node = Node(settings, agreed, 1)
    file = own_folder(agreed) / "history.jsonl"
    file.rename(file.with_suffix(".old"))
    file.symlink_to("/dev/full")
    failure = ask(node, seed_task())
    assert isinstance(failure, protocol.Failure) and failure.exit_code == ResourceError.exit_code


def test_a_line_that_a_power_cut_left_half_spoils_no_other(tmp_path):
    history = History(tmp_path)
    history.agree(Agreement(Terms(methods="a"), {}))
    with (tmp_path / "history.jsonl").open("a") as stream:
        stream.write('{"event": "agreed", "ter')
    history.agree(Agreement(Terms(methods="b"), {}))
    again = History(tmp_path)
    assert [row["event"] for row in again.rows()] == [AGREED, AGREED]
    assert again.agreement(Terms()).terms.methods == history.agreement(Terms()).terms.methods == "b"


def test_a_refusal_is_written_once_until_something_changes(tmp_path):
    history = History(tmp_path)
    for config in [{"a": 1}, {"a": 1}, {"a": 2}, {"a": "x" * 10**6}]:
        history.refuse(config, "run", ["more"])
    assert [row["config"] for row in history.rows()] == [{"a": 1}, {"a": 2}, {}]
    assert all(json.dumps(row) for row in history.rows())


def test_the_order_of_batches_is_the_node_s_own_and_stays_its_own(settings, own, tmp_path):
    def scalars(**changes):
        node = Node(settings, {**own, "terms.methods": "any", **changes}, 1)
        return ask(node, seed_task()).scalars

    mine, public = scalars(), scalars(**{"draw-key": "public"})
    assert not torch.equal(mine, public)
    assert torch.equal(mine, scalars())  # a restarted node
    assert not torch.equal(mine, scalars(folder=str(tmp_path / "another")))
    assert torch.equal(public, scalars(folder=""))  # in memory there is nobody to hide from
