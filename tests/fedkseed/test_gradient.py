"""Whole runs of FedKSeed with the seed-space gradient: every holder the same bits, kilobytes on the wire, learning."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune_strategies.config.node import NodeConfig
from fedtune_strategies.errors import ConfigError, DivergenceError, FingerprintError, ProtocolError
from fedtune_strategies.fedkseed import moved
from fedtune_strategies.fedkseed.gradient_client import SeedGradientClient
from fedtune_strategies.fedkseed.gradient_strategy import SeedGradient
from fedtune_strategies.fedkseed.messages import GradientReply, GradientTask
from fedtune_strategies.fedkseed.panel import panel
from fedtune_strategies.method import NodeContext, register_messages
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.flower import task
from fedtune_strategies.run_config import defaults, parse
from fedtune_strategies.seed_gradient import encode
from fedtune_strategies.seed_space import tuned_parameters
from fedtune_strategies.strategy import arrays_of
from fedtune_strategies.testing import InMemoryGrid
from server_app.export import export_round
from server_app.ledger import Ledger
from server_app.replay import replay
from server_app.run import execute
from tests.federations import assert_resumes_exactly, final_state, make_nodes, run, run_with_restarts
from tests.models import tiny_model

K = 64
GRADIENT = {"method.name": "fedkseed", "fedkseed.estimator": "gradient"}


@pytest.fixture
def settings(settings):
    common = {key: value for key, value in settings.items() if key in defaults("fedkseed", GRADIENT)}
    return common | GRADIENT | {"train.lr": "auto", "fedkseed.seeds": 256}


def test_a_run_killed_at_any_record_resumes_to_the_same_bits(settings, data_files, tmp_path):
    assert_resumes_exactly(settings | {"num-server-rounds": 2, "eval.answers": 0}, data_files, tmp_path, first=5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_restarted_workers_get_every_point_again_and_end_in_the_same_bits(settings, data_files, dtype, tmp_path):
    settings |= {"model.dtype": dtype}
    forgetful = settings | {"run.dir": str(tmp_path / "forgetful")}
    run(settings, data_files)
    run_with_restarts(forgetful, data_files)
    assert final_state(settings)[2] == final_state(forgetful)[2]


def test_replies_make_the_recorded_model_and_any_round_is_exported(settings, data_files, tmp_path):
    ledger = run(settings, data_files)
    folder = Path(settings["run.dir"])
    assert replay(folder).kept == 9
    assert replay(folder, without=["node-0"], out=tmp_path / "without").left_out == 3
    assert export_round(folder, 1, tmp_path / "one") == 1
    assert export_round(folder, None, tmp_path / "last") == 3
    prints = [record.body["fingerprint"] for record in ledger.records("evaluation")]
    assert len(set(prints)) == 4 and all(
        record.body["fingerprint"] == prints[record.round - 1] for record in ledger.records("reply")
    )


def test_a_round_costs_two_kilobytes_up_and_eight_down(settings, data_files):
    """K = 16384 at 1 bit up and 4 bits down; the first round brings nothing down."""
    settings |= {"fedkseed.seeds": 16384, "num-server-rounds": 3, "eval.data": ""}
    replies = list(run(settings, data_files).records("reply"))
    assert [record.body["bytes_up"] for record in replies if not 2048 < record.body["bytes_up"] <= 2200] == []
    down = [record.body["bytes_down"] for record in replies if record.round > 1]
    assert [count for count in down if not 8192 < count <= 8400] == []


def test_a_late_joiner_gets_what_it_lacks_once(settings, data_files):
    settings |= {"num-server-rounds": 5, "strategy.min-nodes": 2, "eval.data": ""}
    nodes, sent = make_nodes(settings, data_files), []
    late = 3

    def spy(number):
        def handle(kind, payload):
            message = protocol.decode(kind, payload)
            if isinstance(message, GradientTask):
                sent.append((number, message.round, len(message.levels)))
                if message.round == 2:
                    grid.nodes.setdefault(late, spy(late))
            return nodes[number].handle(kind, payload)

        return handle

    grid = InMemoryGrid({number: spy(number) for number in (1, 2)})
    execute(grid, settings, run_id=1)
    assert [one for one in sent if one[0] == late] == [(late, 3, 2), (late, 4, 1), (late, 5, 1)]
    assert [one for one in sent if one[0] == 1] == [(1, 1, 0), (1, 2, 1), (1, 3, 1), (1, 4, 1), (1, 5, 1)]


def late_joiner_gets(settings, data_files, monkeypatch, dtype="float32", lose=False):
    """Run where points are thought to take long; returns what the node that comes after two rounds was sent."""
    monkeypatch.setattr(moved, "WALSH_S", 2e-7)  # two points, not one
    monkeypatch.setattr(moved, "PART", 1_000)
    settings |= {"num-server-rounds": 5, "strategy.min-nodes": 2, "eval.data": "", "model.dtype": dtype}
    nodes, sent = make_nodes(settings, data_files), []

    def handle(kind, payload):
        message = protocol.decode(kind, payload)
        sent.append((kind, message.round, len(getattr(message, "levels", ()))) if "gradient" in kind else (kind, 0, 0))
        if lose and len(sent) == 3:
            raise RuntimeError("the worker died in the middle of the weights")
        return nodes[3].handle(kind, payload)

    def first(kind, payload):
        if kind == GradientTask.kind and protocol.decode(kind, payload).round == 2:
            grid.nodes.setdefault(3, handle)
        return nodes[1].handle(kind, payload)

    grid = InMemoryGrid({1: first, 2: nodes[2].handle})
    execute(grid, settings, run_id=1)
    replies = [(one.round, one.node) for one in Ledger.read(Path(settings["run.dir"])).records("reply")]
    return sent, [round for round, name in replies if name == "node-2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_node_gets_the_weights_whole_where_that_is_less_to_the_same_bits(settings, data_files, monkeypatch, dtype):
    """Its replies count: they bear the fingerprint of the server's weights."""
    sent, counted = late_joiner_gets(settings, data_files, monkeypatch, dtype)
    kinds = [(kind, round) for kind, round, _ in sent]
    assert kinds.count(("gradient-weights", 3)) > 2 and sent[-3:] == [
        ("gradient-task", r, n) for r, n in ((3, 0), (4, 1), (5, 1))
    ]
    assert counted == [3, 4, 5]


def test_a_node_to_which_the_weights_did_not_come_gets_points(settings, data_files, monkeypatch):
    sent, counted = late_joiner_gets(settings, data_files, monkeypatch, lose=True)
    tasks = [one for one in sent if one[0] == "gradient-task"]
    assert tasks == [("gradient-task", round, points) for round, points in ((3, 0), (3, 2), (4, 1), (5, 1))]
    assert counted == [3, 4, 5]


def make_client():
    model = tiny_model()
    base = {name: parameter.detach().clone() for name, parameter in tuned_parameters(model).items()}
    return SeedGradientClient(NodeContext(parse(GRADIENT | {"fedkseed.seeds": K}), "a", model, base, [], NodeConfig()))


def test_a_node_adds_only_the_points_that_it_lacks():
    """The reply that would have told the server what the node holds may be lost."""
    node, points = make_client(), np.random.default_rng(2).normal(size=(3, K))
    coded = [encode(np.float32(point), 4) for point in points]

    def task(round, since):
        new = coded[max(0, since) : round - 1]
        levels, units = torch.stack([levels for levels, _ in new]), torch.tensor([unit for _, unit in new])
        return GradientTask(round, since, levels, units, 0.01)

    assert node.take(task(3, 0)) and node._moved.rounds == 2
    before = {name: value.clone() for name, value in node._moved.weights.items()}
    assert node.take(task(3, 1)) and node._moved.rounds == 2
    assert node.take(task(3, 0)) and node._moved.rounds == 2, "a long replay that missed its round is not lost"
    assert all(torch.equal(before[name], value) for name, value in node._moved.weights.items())
    assert node.take(task(4, 1)) and node._moved.rounds == 3
    again = make_client()
    assert not again.take(task(4, 1)) and again.take(task(4, -1))
    assert all(torch.equal(again._moved.weights[name], value) for name, value in node._moved.weights.items())


def test_a_node_with_spoilt_weights_is_refused_and_starts_afresh_with_its_next_task(settings, data_files, monkeypatch):
    settings |= {"num-server-rounds": 4, "strategy.min-replies": 2, "eval.data": ""}
    take = SeedGradientClient.take

    def spoiling(client, task):
        done = take(client, task)
        if (client._name, task.round) == ("node-1", 3):
            client._moved.weights[next(iter(client._moved.weights))].add_(1)
        return done

    monkeypatch.setattr(SeedGradientClient, "take", spoiling)
    ledger = run(settings, data_files)
    refused = [(record.round, record.node) for record in ledger.records("refused")]
    assert refused == [(3, "node-1")]
    assert [record.round for record in ledger.records("reply") if record.node == "node-1"] == [1, 2, 4]


def test_it_learns_more_than_scalars_in_as_many_rounds(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 6, "eval.answers": 0, "fedkseed.seeds": 1024, "train.local-steps": 10}
    zeroth = {key: value for key, value in settings.items() if key in defaults("fedkseed")} | {
        "fedkseed.estimator": "two-sided", "train.lr": 1e-4, "run.dir": str(tmp_path / "zeroth"),
    }  # fmt: skip
    ends = []
    for flat in (settings, zeroth):
        losses = [record.body["eval/loss"] for record in run(flat, data_files).records("evaluation")]
        ends.append(losses[0] - losses[-1])
    assert ends[0] > 0.1 and ends[0] > 2 * max(ends[1], 0.0)


def test_micro_batches_change_the_memory_and_hardly_the_result(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 1, "eval.answers": 0}
    whole = run(settings, data_files)
    parts = run(settings | {"run.dir": str(tmp_path / "parts")}, data_files, **{"micro-batch": 1})
    one, other = (next(ledger.records("evaluation", round=1)).body["eval/loss"] for ledger in (whole, parts))
    assert one == pytest.approx(other, abs=0.02)


def test_part_of_a_model_is_tuned_where_asked(settings, data_files, tmp_path):
    run(settings | {"train.parameters": "layers"}, data_files)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(settings["model.name"]).state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(Path(settings["run.dir"]) / "model").state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all("layers" in name for name in changed)


@pytest.fixture
def strategy():
    InMemoryGrid({})
    register_messages("fedkseed")
    made = SeedGradient(parse(GRADIENT | {"fedkseed.seeds": K}), {"w": torch.randn(8, 16)})
    made.materialise(made.initial_arrays(), {"w": torch.empty(8, 16)})
    return made


def reply(name, theta, *, round=1, print_="", unit=None, bits=1, loss=2.0, examples=10):
    levels, own = encode(np.float32(theta), bits)
    return GradientReply(name, round, loss, print_, examples, 1.0, 10, levels, own if unit is None else unit, 0)


def fold(strategy, round, replies):
    return strategy.aggregate_train(round, [task(1, one, round) for one in replies])


def test_the_move_is_the_mean_of_signs_rounded_before_it_is_made(strategy):
    points = np.random.default_rng(0).normal(size=(3, K))
    arrays, metrics = fold(strategy, 1, [reply(f"n{i}", point) for i, point in enumerate(points)])
    units = np.abs(points).mean(axis=1)
    mean = (np.minimum(units, np.median(units))[:, None] * np.sign(points)).mean(axis=0)
    levels, unit = encode(mean.astype(np.float32), 4)
    assert torch.equal(strategy.points[0][0], levels) and strategy.points[0][1] == pytest.approx(unit)
    assert np.abs(arrays["theta"].numpy() - mean).max() <= unit
    assert 0.9 < metrics["move/kept"] <= 1.0


def test_a_node_moves_no_coordinate_by_more_than_the_median_does(strategy):
    honest = [reply(f"n{i}", np.full(K, 0.01)) for i in range(4)]
    arrays, _ = fold(strategy, 1, [*honest, reply("n9", np.full(K, -1e6))])
    assert arrays["theta"].numpy() == pytest.approx(np.full(K, 0.6 * 0.01), rel=0.1)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda print_: reply("a", np.ones(K), print_="other"), FingerprintError),
        (lambda print_: reply("a", np.ones(K), print_=print_, round=2), ProtocolError),
        (lambda print_: reply("a", np.ones(K + 8), print_=print_), ProtocolError),
        (lambda print_: reply("a", np.ones(K), print_=print_, unit=float("nan")), DivergenceError),
        (lambda print_: reply("a", np.ones(K), print_=print_, unit=0.0), DivergenceError),
        (lambda print_: reply("a", np.ones(K), print_=print_, bits=2), ProtocolError),
        (lambda print_: protocol.Ack("a", 1), ProtocolError),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(strategy, bad, error):
    with pytest.raises(error):
        strategy.accept(1, bad(strategy.fingerprint))
    assert strategy.accept(1, reply("a", np.ones(K), print_=strategy.fingerprint))


def test_the_status_page_shows_the_newest_point(strategy):
    points = np.random.default_rng(0).normal(size=(2, K)) / 100
    _, metrics = fold(strategy, 1, [reply("a", points[0]), reply("b", points[1])])
    state = {name: tensor.numpy() for name, tensor in strategy.state().tensors.items()}
    shown = panel(strategy.config, state)
    assert sum(height for _, height in shown.columns) == K and len(shown.columns) == 16
    assert f"by {metrics['move/rms']:.2%} of" in shown.note and f"kept {metrics['move/kept']:.1%} of" in shown.note
    strategy.skip(2, strategy.initial_arrays())
    assert panel(strategy.config, {name: tensor.numpy() for name, tensor in strategy.state().tensors.items()}) is None


def test_a_restored_strategy_continues_with_the_same_bits(strategy):
    random = np.random.default_rng(1)
    rounds = [[reply(f"n{i}", random.normal(size=K), round=number) for i in range(3)] for number in (1, 2, 3)]
    again = SeedGradient(strategy.config, {name: value for name, value in strategy.moved.weights.items()})
    files = {}
    for number, replies in enumerate(rounds, start=1):
        fold(strategy, number, replies)
        files |= strategy.state().files
        if number == 2:
            again.restore(strategy.state().tensors, files.get)
    fold(again, 3, rounds[2])
    assert all(
        torch.equal(one[0], other[0]) and one[1] == other[1]
        for one, other in zip(strategy.points, again.points, strict=True)
    )
    prints = [one.materialise(arrays_of(), {"w": torch.empty(8, 16)}) for one in (strategy, again)]
    assert prints[0] == prints[1]


def test_keys_of_the_other_estimators_are_refused_by_name():
    for flat, word in (
        (GRADIENT | {"fedkseed.eps": 1e-3}, "fedkseed.eps"),
        ({"fedkseed.up-bits": 1}, "fedkseed.up-bits"),
        ({"method.name": "fedkseed-pro", "fedkseed.estimator": "gradient"}, "fedkseed-pro|no seeds to"),
    ):
        with pytest.raises(ConfigError, match=word):
            parse(flat)


def test_the_ledger_says_with_which_settings_it_ran(settings, data_files):
    ledger = run(settings | {"num-server-rounds": 1, "eval.data": ""}, data_files)
    config = Ledger.read(ledger.folder).last("start").body["config"]
    assert config["fedkseed.down-bits"] == 4 and config["train.beta1"] == 0.5 and "fedkseed.eps" not in config
