"""Flower's strategies on theta against their formulas, and the step size over the rounds."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.seed_draws import draw_seeds, seed_key
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol.flower import task
from fedtune_strategies.run_config import parse
from fedtune_strategies.strategy import arrays_of, settings_of
from fedtune_strategies.testing import InMemoryGrid
from tests.federations import assert_resumed_alike, run

K, TAU, ETA = 32, 8, 0.25
ALL = ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedmedian", "trimmed-mean", "krum"]


def make(aggregation, **changes):
    keys = {"fedkseed.seeds": K, "train.local-steps": TAU, "train.lr": ETA, "strategy.aggregation": aggregation}
    keys |= {
        "fedkseed.theta-bits": 24,
        "fedkseed.clip": 0.0,
        "fedkseed.outlier": 0.0,
    }  # rounding and clipping have tests of their own
    return FedKSeed(parse(keys | {name.replace("__", ".").replace("_", "-"): v for name, v in changes.items()}), {})


def play(strategy, rounds, first=1):
    """Play rounds of given scalars, a list for each round and node; returns theta after each."""
    fleet = Fleet(InMemoryGrid({}), "base")
    points, arrays = [], arrays_of(theta=torch.from_numpy(strategy.theta))
    for number, answers in enumerate(rounds, start=first):
        settings = ConfigRecord(settings_of(strategy.config, number))
        strategy.configure_train(number, arrays, settings, fleet)
        replies = [
            SeedReply(f"n{i}", number, 2.0, "", 1, 1.0, 1, torch.tensor(one, dtype=torch.float32), 1.0, 1e-4, 0.1)
            for i, one in enumerate(answers)
        ]
        messages = [task(1, reply, number) for reply in replies]
        arrays, _ = strategy.aggregate_train(number, messages)
        points.append(arrays["theta"].numpy().astype(np.float64))
    return points


def pushes(strategy, rounds):
    """Return each round's and node's move of theta, by the formula: -eta sum g e_k."""
    moves = np.zeros((len(rounds), len(rounds[0]), K))
    for number, answers in enumerate(rounds, start=1):
        for i, scalars in enumerate(answers):
            seeds = draw_seeds(seed_key(strategy.config, number, f"n{i}"), TAU, K, np.empty(0, np.int16))
            np.subtract.at(moves[number - 1, i], seeds, ETA * np.float32(scalars).astype(float))
    return moves


def some_rounds(rounds=3, nodes=5):
    return np.random.default_rng(0).normal(size=(rounds, nodes, TAU)).tolist()


def test_momentum():
    strategy, rounds = make("fedavgm", strategy__momentum=0.5), some_rounds()
    means = pushes(strategy, rounds).mean(axis=1)
    velocity, theta = np.zeros(K), np.zeros(K)
    for mean, point in zip(means, play(strategy, rounds), strict=True):
        velocity = 0.5 * velocity + mean
        theta = theta + velocity
        np.testing.assert_allclose(point, theta, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_steps(name):
    strategy, rounds = make(name), some_rounds()
    m, v, theta = np.zeros(K), np.zeros(K), np.zeros(K)
    for number, point in enumerate(play(strategy, rounds), start=1):
        move = pushes(strategy, rounds).mean(axis=1)[number - 1]
        m = 0.9 * m + 0.1 * move
        if name == "fedadam":
            v = 0.99 * v + 0.01 * move**2
            step = ETA * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        else:
            v = v - 0.01 * move**2 * np.sign(v - move**2)
            step = ETA
        theta = theta + step * m / (np.sqrt(v) + 0.01 * ETA)
        np.testing.assert_allclose(point, theta, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("name", "centre"), [("fedmedian", np.median), ("trimmed-mean", None), ("krum", None)])
def test_robust_aggregation_withstands_one_of_five(name, centre):
    rounds = some_rounds(rounds=1)
    rounds[0][0] = [1e6] * TAU
    strategy = make(name)
    moves = pushes(strategy, rounds)[0]
    (point,) = play(strategy, rounds)
    if name == "fedmedian":
        expected = np.median(moves, axis=0)
    elif name == "trimmed-mean":
        expected = np.sort(moves, axis=0)[1:-1].mean(axis=0)
    else:
        distances = ((moves[:, None] - moves[None]) ** 2).sum(axis=-1)
        expected = moves[np.sort(distances, axis=1)[:, 1:3].sum(axis=1).argmin()]
    np.testing.assert_allclose(point, expected, rtol=1e-5, atol=2e-3)
    assert np.abs(point).max() > 0


def test_nodes_whose_replies_are_compared_draw_the_same_seeds():
    for name in ALL:
        config = make(name).config
        shared = seed_key(config, 1, "a") == seed_key(config, 1, "b")
        assert shared == (name in ("fedmedian", "trimmed-mean", "krum"))
        assert seed_key(config, 1, "a") != seed_key(config, 2, "a")


def test_server_step_and_weight_decay():
    rounds = some_rounds(rounds=1)
    strategy = make("fedavg", strategy__server_lr=0.5, train__weight_decay=0.1)
    strategy.theta = np.linspace(-1, 1, K).astype(np.float16).astype(np.float32)
    expected = 0.9 * np.linspace(-1, 1, K) + 0.5 * pushes(strategy, rounds).mean(axis=1)[0]
    np.testing.assert_allclose(play(strategy, rounds)[0], expected, rtol=1e-5, atol=2e-3)


def test_the_round_s_step_size_moves_theta():
    strategy, rounds = make("fedavg", train__lr_schedule="linear", num_server_rounds=4), some_rounds()
    moves = pushes(strategy, rounds).mean(axis=1)
    np.testing.assert_allclose(
        play(strategy, rounds)[-1], 0.875 * moves[0] + 0.625 * moves[1] + 0.375 * moves[2], rtol=1e-5, atol=2e-3
    )


@pytest.mark.parametrize("name", ALL)
def test_a_restored_strategy_goes_on_with_the_same_bits(name):
    rounds = some_rounds(rounds=4)
    whole, first, second = make(name), make(name), make(name)
    straight = play(whole, rounds)
    play(first, rounds[:2])
    second.restore({key: value.clone() for key, value in first.state().tensors.items()}, lambda label: None)
    assert np.array_equal(play(second, rounds[2:], first=3)[-1], straight[-1])


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(settings, data_files, tmp_path, name):
    settings |= {"strategy.aggregation": name, "num-server-rounds": 3, "eval.answers": 0}
    run(settings, data_files)
    assert_resumed_alike(settings, data_files, tmp_path)
