"""Folding a run anew, with everybody and without some."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deploy.cli import app
from fedtune_strategies.errors import LedgerError
from fedtune_strategies.fedkseed.moved import Moved
from fedtune_strategies.fedkseed.pools import rebuild
from fedtune_strategies.fedkseed.seed_draws import draw_seeds, seed_key
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_gradient import decode
from server_app.ledger import Ledger
from server_app.replay import replay
from tests.federations import run

METHODS = ["fedkseed", "fedkseed-pro", "fedcybgd"]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def command(*words):
    done = CliRunner().invoke(app, ["ledger", *map(str, words)])
    return done.exit_code, done.output


@pytest.mark.parametrize("method", METHODS)
def test_the_replies_make_the_recorded_model(settings, data_files, method, tmp_path):
    settings |= {"method.name": method, "num-server-rounds": 4}
    run(settings, data_files)
    folder = Path(settings["run.dir"])
    done = replay(folder, out=tmp_path / "again")
    assert (done.rounds, done.left_out) == (4, 0)
    ours, theirs = weights(tmp_path / "again"), weights(folder / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # A reply changed by somebody who also mended the chain of hashes does not make the model any more.
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        seq, blob = db.execute("SELECT seq, blob FROM records WHERE kind = 'reply' ORDER BY seq LIMIT 1").fetchone()
        message = protocol.decode({"fedcybgd": "block-reply"}.get(method, "seed-reply"), blob)
        moved = message.delta[next(iter(message.delta))] if method == "fedcybgd" else message.scalars
        moved += 1.0
        db.execute("UPDATE records SET blob = ? WHERE seq = ?", (protocol.encode(message), seq))
    db.close()
    with pytest.raises(LedgerError, match="do not make the model"):
        replay(folder)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_node_the_others_contributions_are_left(settings, data_files, method, tmp_path):
    settings |= {"method.name": method, "num-server-rounds": 4}
    settings |= {} if method == "fedcybgd" else {"fedkseed.theta-bits": 24, "fedkseed.clip": 0.0}
    ledger = run(settings, data_files)
    folder, out = Path(settings["run.dir"]), tmp_path / "without"
    code, told = command("replay", folder, "--without", "node-0", "--out", out)
    assert code == 0 and "without" in told
    assert "node-0" in (out / "README.md").read_text()
    base = weights(settings["model.name"])
    left = {name: value - base[name] for name, value in weights(out).items()}
    replies = [record for record in ledger.records("reply") if record.node != "node-0"]
    if method == "fedcybgd":
        moved = set()
        for record in replies:
            delta = protocol.decode("block-reply", ledger.payload(record)).delta
            moved |= set(delta)
            for name, value in delta.items():
                left[name] -= value
        assert moved and all(torch.allclose(value, torch.zeros(()), atol=1e-6) for value in left.values())
    else:
        # By hand: every reply moves the seeds that its node drew, by its share of the examples.
        config, theta = parse(settings), np.zeros(64)
        for number in range(1, 5):
            state = (
                {} if number == 1 else safetensors.torch.load(ledger.payload(list(ledger.records("round"))[number - 2]))
            )
            answers = [protocol.decode("seed-reply", ledger.payload(one)) for one in replies if one.round == number]
            total = sum(answer.num_examples for answer in answers)
            odds = _odds(config, state)
            for answer in answers:
                seeds = draw_seeds(seed_key(config, number, answer.node, answer.key), 6, 64, odds)
                share = answer.num_examples / total
                np.subtract.at(theta, seeds, config.train.lr * share * answer.scalars.numpy().astype(float))
        assert np.allclose(_theta(settings, out), theta, atol=2e-3 * np.abs(theta).max())


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed-pro"])
def test_scalars_stay_in_their_pool_where_a_round_keeps_no_reply(settings, data_files, method, tmp_path):
    settings |= {"method.name": method, "num-server-rounds": 6, "strategy.fraction-train": 0.3, "train.seed": 3}
    settings |= {"fedkseed.pool-every": 2, "fedkseed.theta-bits": 24, "fedkseed.clip": 0.0}
    ledger = run(settings, data_files)
    rounds = list(ledger.records("round"))
    # Of round 2, which closes the first pool, and of round 3 no reply is kept.
    assert [number for number, one in enumerate(rounds, 1) if one.body["replies"] == ["node-0"]] == [2, 3]
    first = [safetensors.torch.load(ledger.payload(one))["theta"] for one in rounds[::2]]
    whole = [ledger.get_file(one.body["files"][f"pool-{pool}"])["theta"] for pool, one in enumerate(rounds[1::2])]
    points = [first[0], whole[1] - first[1], whole[2]]
    folder = Path(settings["run.dir"])
    replay(folder, ["node-0"], out=tmp_path / "without")
    base = {name: value for name, value in weights(settings["model.name"]).items() if name != "lm_head.weight"}
    expected = {name: torch.empty_like(value) for name, value in base.items()}
    rebuild(parse(settings), [point.numpy() for point in points], expected, base)
    found = weights(tmp_path / "without")
    assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in expected.items())
    assert not torch.equal(found["model.norm.weight"], base["model.norm.weight"])


def test_points_stay_in_their_pool_where_a_round_keeps_no_reply(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 6, "strategy.fraction-train": 0.3, "train.seed": 3}
    settings |= {"fedkseed.estimator": "gradient", "fedkseed.up-bits": 8, "fedkseed.down-bits": 8}
    ledger, folder = run(settings, data_files), Path(settings["run.dir"])
    files = [next(iter(one.body["files"].values())) for one in ledger.records("round")]
    points = [decode(one["levels"], float(one["unit"]), 8, 64) for one in map(ledger.get_file, files)]
    replay(folder, ["node-0"], out=tmp_path / "without")
    base = {name: value for name, value in weights(settings["model.name"]).items() if name != "lm_head.weight"}
    moved = Moved(parse(settings), base)
    moved.follow([point * (number not in (2, 3)) for number, point in enumerate(points, 1)])
    found = weights(tmp_path / "without")
    for name, value in moved.weights.items():  # up to the running unit, in which a round had its part
        assert (found[name] - value).abs().max() < 0.03 * (value - base[name]).abs().max(), name


def _odds(config, state):
    from fedtune_strategies.fedkseed.pro import FedKSeedPro

    if "sums" not in state:
        return np.empty(0, dtype=np.int16)
    strategy = FedKSeedPro(config, {})
    strategy.sums, strategy.count = state["sums"].numpy(), state["count"].numpy()
    return strategy.odds()


def _theta(settings, folder):
    """Project an exported model back onto the seeds: they are orthogonal to each other."""
    from fedtune_strategies.language.base import base_tensors
    from fedtune_strategies.language.model import load_model
    from fedtune_strategies.seed_space import make_pool, tuned_parameters

    base = base_tensors(load_model(settings["model.name"], "float32"))
    tuned = tuned_parameters(load_model(str(folder), "float32").model)
    pool = make_pool("walsh", key=0, size=64)
    columns = []
    for k in range(64):
        one = {name: torch.zeros_like(value) for name, value in base.items()}
        theta = torch.zeros(64)
        theta[k] = 1.0
        pool.rebuild_model(one, {name: torch.zeros_like(value) for name, value in base.items()}, theta)
        columns.append(torch.cat([value.flatten() for value in one.values()]))
    change = torch.cat([(tuned[name].detach() - base[name]).flatten() for name in base])
    return torch.linalg.lstsq(torch.stack(columns, dim=1).double(), change.double()[:, None]).solution[:, 0].numpy()


def test_the_commands(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 2, "eval.answers": 0}
    ledger = run(settings, data_files)
    folder = Path(settings["run.dir"])
    total = sum(1 for _ in ledger.records())
    assert command("verify", folder) == (0, f"{folder}: {total} records and 0 files, all as they were written\n")
    code, told = command("show", folder, "--kind", "reply", "--node", "node-1")
    assert code == 0 and len(told.splitlines()) == 2 and "loss=" in told
    assert command("show", folder, "--round", "2", "--format", "json")[1].count('"seq"') > 3
    code, told = command("replay", folder)
    assert code == 0 and "2 rounds, 6 replies make the recorded model" in told
    for words, reason in (
        (("replay", folder, "--without", "nobody", "--out", tmp_path / "x"), "its nodes are node-0, node-1, node-2"),
        (("replay", folder, "--without", "node-1"), "--out"),
        (("replay", folder, "--round", "7"), "2 rounds, not 7"),
        (("verify", tmp_path / "none"), "no run in"),
    ):
        code, told = command(*words)
        assert code == LedgerError.exit_code and reason in told and len(told.splitlines()) == 1
    assert "nothing is damaged" in command("cut", folder)[1]
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("UPDATE records SET node = 'x' WHERE seq = 5")
    db.close()
    code, told = command("verify", folder)
    assert code == LedgerError.exit_code and "damaged after record 4" in told
    assert "cut back to record 4" in command("cut", folder)[1]


@pytest.mark.parametrize("method", ["fedkseed", "fedavg"])
def test_a_pruned_run_is_resumed_and_exported_but_not_replayed(settings, data_files, method, tmp_path):
    settings |= {"method.name": method, "num-server-rounds": 2}
    folder = Path(settings["run.dir"])
    run(settings, data_files)
    code, told = command("prune", folder)
    assert code == 0 and "freed" in told
    ledger = Ledger.read(folder)
    assert ledger.damage() is None and command("verify", folder)[0] == 0
    with pytest.raises(LedgerError):
        ledger.payload(next(ledger.records("reply")))
    code, told = command("replay", folder)
    assert code == LedgerError.exit_code and "removed by `fedtune ledger prune`" in told
    run(settings | {"num-server-rounds": 3}, data_files)
    whole = settings | {"num-server-rounds": 3, "run.dir": str(tmp_path / "whole")}
    run(whole, data_files)
    for number in (1, 3):
        done = CliRunner().invoke(
            app, ["export", str(folder), "--round", str(number), "--out", str(tmp_path / f"{number}")]
        )
        assert done.exit_code == 0, done.output
    ours, theirs = weights(tmp_path / "3"), weights(tmp_path / "whole" / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_keeps_no_replies_ends_in_the_same_model(settings, data_files, tmp_path, monkeypatch):
    monkeypatch.setattr("server_app.ledger.INLINE_BYTES", 1000)
    settings |= {"method.name": "fedavg", "num-server-rounds": 3}
    whole = settings | {"run.dir": str(tmp_path / "whole")}
    run(whole, data_files)
    pruned = settings | {"run.prune": True}
    for rounds in (2, 3):  # it is resumed, too
        run(pruned | {"num-server-rounds": rounds}, data_files)
        ledger = Ledger.read(Path(settings["run.dir"]))
        assert ledger.damage() is None
        files = {path.stem for path in ledger.folder.glob("files/*")}
        assert files == {name for _, name in ledger.files()}
        assert not files & {record.file for record in ledger.records("reply")}
        assert ledger.last("pruned").round == rounds
    assert all(record.file for record in ledger.records("reply"))
    ours, theirs = (weights(Path(one["run.dir"]) / "model") for one in (pruned, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
