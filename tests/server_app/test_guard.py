"""Runs that get worse or stop improving: when they end, and which round they keep."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune_strategies.errors import ConfigError, DivergenceError, NodesError
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import parse
from fedtune_strategies.testing import InMemoryGrid
from server_app.export import export_round
from server_app.guard import Guard
from server_app.ledger import Ledger
from server_app.run import execute
from tests.deploy.status.runs import report
from tests.federations import make_grid, make_nodes, run
from tests.server_app.test_run import forge

# A step size that destroys the model, by method.
RUINOUS = {
    "fedkseed": {"train.lr": 0.1},
    "fedkseed-pro": {"train.lr": 0.1},
    # These two cannot step as far: they end above their start by less.
    "gradient": {"train.lr": 1.0, "fedkseed.estimator": "gradient", "run.divergence": 0.3},
    "fedit": {"train.lr": 300.0, "lora.alpha": 100_000, "run.divergence": 0.02},
    "fedcybgd": {"train.lr": 30.0},
    "fedavg": {"train.lr": 30.0},
    "fedzo": {"train.lr": 0.1},
}


def ruinous(settings, method, rounds=16):
    name = "fedkseed" if method == "gradient" else method
    return settings | {"method.name": name, "num-server-rounds": rounds, "eval.answers": 0, **RUINOUS[method]}


def kept_model(settings):
    return AutoModelForCausalLM.from_pretrained(Path(settings["run.dir"]) / "model")


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("method", RUINOUS)
def test_a_run_that_diverges_ends_with_its_own_code_and_keeps_its_best_round(
    settings, data_files, method, held_out, tmp_path
):
    settings = ruinous(settings, method)
    if not held_out:
        settings |= {"eval.data": ""}
    with pytest.raises(DivergenceError, match=r"the run diverges.*train\.lr") as caught:
        run(settings, data_files)
    assert "\n" not in str(caught.value)
    folder = Path(settings["run.dir"])
    ledger = Ledger.read(folder)
    end = ledger.last("failed").body
    assert end["exit_code"] == 21 and end["kept"] < ledger.last("round").round
    losses = {one.round: one.body["eval/loss"] for one in ledger.records("evaluation")}
    assert not held_out or losses[end["kept"]] == min(losses.values())
    assert export_round(folder, end["kept"], tmp_path / "again") == end["kept"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(map(torch.equal, kept_model(settings).parameters(), again.parameters()))
    shown = report(folder)["run"]
    assert (shown["state"], shown["kept"], shown["exported"]) == ("failed", end["kept"], str(folder / "model"))
    assert f"after round {end['kept']}" in (folder / "model" / "README.md").read_text()


def test_a_resumed_run_that_diverged_stops_at_once_and_goes_on_without_the_guard(settings, data_files):
    settings = ruinous(settings, "fedavg", rounds=5)
    nodes = make_nodes(settings, data_files)
    with pytest.raises(DivergenceError) as first:
        execute(make_grid(nodes), settings, run_id=1)
    done = Ledger.read(Path(settings["run.dir"])).last("round").round
    with pytest.raises(DivergenceError) as second:
        execute(make_grid({}), settings, run_id=2)
    assert str(first.value) == str(second.value) and done < 5
    execute(make_grid(nodes), settings | {"run.divergence": 0.0}, run_id=3)
    assert Ledger.read(Path(settings["run.dir"])).last("finished").body["kept"] == 5


@pytest.mark.parametrize(("spoilt", "error"), [(3, DivergenceError), (2, NodesError)])
def test_a_round_in_which_all_replies_are_no_numbers_ends_a_run_as_divergence(settings, data_files, spoilt, error):
    settings = settings | {"method.name": "fedavg", "strategy.min-replies": 3, "round.attempts": 1}
    nodes = make_nodes(settings, data_files)

    def spoil(reply):
        for value in reply.arrays.values():
            value.fill_(torch.nan)
        return reply

    def fail(reply):
        return protocol.Failure(13, "no memory left")

    grid = {number: forge(node, spoil if number <= spoilt else fail) for number, node in nodes.items()}
    with pytest.raises(error, match="not finite"):
        execute(InMemoryGrid(grid), settings, run_id=1)
    assert Ledger.read(Path(settings["run.dir"])).last("failed").body.get("kept") == (0 if spoilt == 3 else None)


def scripted(folder, losses=(), node_losses=(), **keys):
    """A guard over a ledger with held-out losses from round 0 on, or each round's losses by node from round 1 on."""
    ledger = Ledger(folder / "scripted")
    for number, loss in enumerate(losses):
        ledger.append("evaluation", round=number, body={"eval/loss": loss})
    for number, round_losses in enumerate(node_losses, start=1):
        for name, loss in round_losses.items():
            ledger.append("reply", round=number, node=name, body={"loss": loss})
        ledger.append("round", round=number)
    ledger.close()
    data = {"eval.data": "held_out.jsonl"} if losses else {}
    return Guard(parse({**data, **keys}), Ledger.read(folder / "scripted"))


@pytest.mark.parametrize("losses", [[2.0, 1.5, 9.0, 9.0, 2.4], [2.0, 2.9, 2.9, 2.9, 2.9], [3.0, 2.0, 1.0]])
def test_a_passing_rise_a_small_one_and_none_stop_nothing(tmp_path, losses):
    guard = scripted(tmp_path, losses)
    assert guard.look() == ""
    assert guard.best == losses.index(min(losses))


@pytest.mark.parametrize("losses", [[2.0, 1.5, 2.6, 2.7, 2.8], [2.0, 1.5, math.nan], [2.0, 1.5, math.inf]])
def test_a_lasting_rise_or_no_number_stops(tmp_path, losses):
    guard = scripted(tmp_path, losses)
    with pytest.raises(DivergenceError):
        guard.look()
    assert guard.best == 1


def test_nodes_are_compared_with_themselves_and_the_median_counts(tmp_path):
    # Nodes of unlike data in turn are no rise; one node whose loss grows is outvoted.
    rounds = [{"a": 1.0}, {"b": 5.0}, {"c": 9.0}, {"a": 0.9}, {"b": 4.9}, {"c": 8.9}]
    rounds += [{"a": 20.0 + number, "b": 4.8, "c": 8.8} for number in range(4)]
    assert scripted(tmp_path, node_losses=rounds).look() == ""
    losses_withheld = [{"a": math.nan, "b": math.nan}] * 5
    assert scripted(tmp_path / "private", node_losses=losses_withheld).look() == ""


def test_patience_ends_a_run_early_and_keep_exports_the_best_round(settings, data_files):
    settings = ruinous(settings, "fedavg", rounds=9)
    settings |= {"run.divergence": 0.0, "run.patience": 2, "run.keep": "best", "eval.answers": 2}
    ledger = run(settings, data_files)
    end = ledger.last("finished").body
    losses = {one.round: one.body["eval/loss"] for one in ledger.records("evaluation")}
    assert end["kept"] == min(losses, key=losses.get) and ledger.last("round").round == end["kept"] + 2
    assert "run.patience" in report(Path(settings["run.dir"]))["run"]["message"]
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    if end["kept"] == 0:
        assert all(map(torch.equal, kept_model(settings).parameters(), base.parameters()))


@pytest.mark.parametrize("keys", [{"run.patience": 3}, {"run.keep": "best"}])
def test_what_goes_by_held_out_loss_wants_held_out_data(keys):
    with pytest.raises(ConfigError, match=r"eval\.data"):
        parse(keys)
