"""Theta on the wire: what a round costs in bytes, and that rounding loses nothing."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.packing import unpack
from fedtune_strategies.fedkseed.pro import FedKSeedPro
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.fedkseed.versions import LARGEST, Versions, round_move, unit_of
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.records import from_record, to_record
from fedtune_strategies.run_config import parse
from fedtune_strategies.strategy import arrays_of
from fedtune_strategies.testing import InMemoryGrid

K, TAU = 4096, 200


@given(arrays.arrays(np.float64, 20, elements=st.floats(-1e7, 1e7)), st.integers(3, 24))
def test_a_rounded_move_fits_into_its_bits_and_is_near(move, bits):
    rounded = round_move(move, bits)
    common = int(np.bitwise_or.reduce(rounded))
    step = common & -common if common else 1
    assert np.abs(rounded // step).max() < 2 ** (bits - 1)
    largest = max(np.abs(move).max(), 1)
    assert np.abs(rounded - move).max() <= max(0.5, largest / (2 ** (bits - 1) - 1))


def test_moves_beyond_the_range_end_at_its_edge():
    assert round_move(np.array([1e300, -1e300, 1.0]), 8).tolist() == pytest.approx([LARGEST, -LARGEST, 0], rel=0.01)


def test_theta_says_when_its_range_is_used_up(caplog):
    strategy = FedKSeed(parse({"fedkseed.seeds": 8, "train.lr": 1e-4}), {})
    strategy._move(np.full(8, 0.5))
    assert "range" not in caplog.text
    strategy._move(np.full(8, 1e6))
    assert "8 coordinates of theta stay at the end of their range" in caplog.text and np.isfinite(strategy.theta).all()


@given(st.floats(1e-12, 1e3))
def test_the_unit_is_a_power_of_two_and_a_thousandth_of_the_step(lr):
    unit = unit_of(lr)
    assert np.frexp(unit)[0] == 0.5 and 1024 <= lr / unit < 2048


def test_a_node_gets_the_change_since_its_version_or_the_whole():
    versions, theta = Versions(), np.zeros(K, dtype=np.int32)
    random = np.random.default_rng(0)
    points = [theta.copy()]
    versions.hold("returning", 0)
    for version in range(5):
        versions.add(version, [theta.copy()])
        versions.hold("returning", version)
        theta[random.choice(K, 100)] += random.integers(-120, 120, 100)
        points.append(theta.copy())
    versions.add(5, [theta.copy()])
    since, change = versions.change(versions.since("returning"), 5)
    assert since == 4 and np.array_equal(unpack(change, K), points[5] - points[4])
    since, whole = versions.change(versions.since("new"), 5)
    assert since == 0 and np.array_equal(unpack(whole, K), points[5]) and whole.numel() > change.numel()
    versions.forget("returning")
    assert versions.since("returning") == 0


def test_a_fresh_pool_costs_a_returning_node_no_more_than_a_round():
    versions, random = Versions(), np.random.default_rng(0)
    old = [random.integers(-(2**20), 2**20, K, dtype=np.int32) for _ in range(9)]
    moved = random.integers(-127, 128, K, dtype=np.int32)
    versions.add(10, old)
    versions.hold("a", 10)
    versions.add(11, [*old[:-1], old[-1] + moved, np.zeros(K, dtype=np.int32)])
    _, change = versions.change(10, 11)
    assert np.array_equal(unpack(change, 2 * K), np.concatenate([moved, np.zeros(K, dtype=np.int32)]))
    assert change.numel() < K + 100


def test_only_versions_that_some_node_holds_are_kept():
    versions = Versions()
    for version in range(50):
        versions.add(version, [np.zeros(3, dtype=np.int32)])
        versions.hold("a", version)
    versions.hold("b", 3)
    assert len(versions._points) <= 2


def long_reply(node, round, scalars, fingerprint=""):
    """Make a reply whose numbers take many digits."""
    facts = {"loss": 2.123456789, "num_examples": 999, "seconds": 12.345678, "peak_memory": 10**10}
    found = {"lr": 1.23456789e-4, "noise": 0.123456789}
    return SeedReply(node, round, scalars=scalars, unit=1.0, fingerprint=fingerprint, **facts, **found)


def rounds(cls, nodes, count, **changes):
    """Play rounds of random scalars; yields {node: (bytes down, bytes up)} for each."""

    def greet(name):
        reply = protocol.HelloReply(name, protocol.PROTOCOL_VERSION, 5, "base", 1)
        return lambda kind, payload: (reply.kind, protocol.encode(reply))

    keys = {"fedkseed.seeds": K, "train.local-steps": TAU}
    keys |= {"method.name": "fedkseed-pro"} if cls is FedKSeedPro else {}
    strategy = cls(parse(keys | changes), {})
    fleet = Fleet(InMemoryGrid({i: greet(f"node-{i:02d}") for i in range(nodes)}), "base")
    fleet.wait_for_nodes(nodes, wait=1)
    names = {node.id: name for name, node in fleet.nodes.items()}
    random, point = np.random.default_rng(0), strategy.initial_arrays()
    for number in range(1, count + 1):
        messages = strategy.configure_train(number, point, ConfigRecord(), fleet)
        down = {names[m.metadata.dst_node_id]: len(from_record(m.content)[1]) for m in messages}
        replies = []
        for name in down:
            scalars = torch.from_numpy(random.standard_t(3, TAU).astype(np.float32) * 3)
            replies.append(long_reply(name, number, scalars))
            strategy.accept(number, replies[-1])
        up = {reply.node: len(protocol.encode(reply)) for reply in replies}
        yield {name: (down[name], up[name]) for name in down}
        records = [to_record(reply.kind, protocol.encode(reply)) for reply in replies]
        point, _ = strategy.aggregate_train(number, [_Content(record) for record in records])


class _Content:
    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize("cls", [FedKSeed, FedKSeedPro])
@pytest.mark.parametrize("nodes", [4, 40])
def test_a_round_of_a_returning_node_stays_under_8000_bytes(cls, nodes):
    for sizes in rounds(cls, nodes, 8):
        assert max(down + up for down, up in sizes.values()) < 8000


def test_a_round_of_a_new_node_stays_under_18000_bytes():
    strategy = FedKSeedPro(parse({"method.name": "fedkseed-pro", "fedkseed.seeds": K, "train.local-steps": TAU}), {})
    random = np.random.default_rng(0)
    strategy.observe(np.arange(K), random.standard_t(3, K).astype(np.float32))
    strategy.versions.add(98, [random.integers(-LARGEST, LARGEST, K, dtype=np.int32)])  # the most that theta can need
    task = strategy._task(99, 0)
    reply = long_reply("node-0", 99, torch.randn(TAU), "0" * 16)
    assert task.levels.numel() > 500
    assert len(protocol.encode(task)) + len(protocol.encode(reply)) < 18000


def test_what_rounding_leaves_is_never_lost():
    coarse, fine = (
        FedKSeed(parse({"fedkseed.seeds": 64, "train.local-steps": 8, "fedkseed.theta-bits": bits}), {})
        for bits in (3, 24)
    )
    InMemoryGrid({})
    random = np.random.default_rng(0)
    for number in range(1, 30):
        reply = long_reply("n", number, torch.from_numpy(random.normal(size=8).astype(np.float32)))
        for strategy in (coarse, fine):
            strategy.aggregate_train(number, [_Content(to_record(reply.kind, protocol.encode(reply)))])
    np.testing.assert_allclose(coarse.theta + coarse.carry, fine.theta + fine.carry, atol=1e-9)
    assert not np.array_equal(coarse.theta, fine.theta)


def test_theta_survives_storage_with_its_unit():
    strategy = FedKSeed(parse({"fedkseed.seeds": 8}), {})
    units = np.array([0, 1, -1, LARGEST, -LARGEST, 77, 2**20, -5])
    theta = (units * strategy.unit).astype(np.float32)
    assert np.array_equal(np.rint(arrays_of(theta=torch.from_numpy(theta))["theta"].numpy() / strategy.unit), units)


def test_the_worst_numbers_stay_under_8000_bytes():
    strategy, random = (
        FedKSeedPro(parse({"method.name": "fedkseed-pro", "fedkseed.seeds": K, "train.local-steps": TAU}), {}),
        np.random.default_rng(0),
    )
    strategy.observe(np.arange(K), random.uniform(0, 1, K).astype(np.float32))
    before = random.integers(-(2**22), 2**22, K, dtype=np.int32)
    strategy.versions.add(97, [before])
    strategy.versions.hold("node-0", 97)
    strategy.versions.add(98, [before + random.integers(-127, 128, K, dtype=np.int32) * 64])
    task = strategy._task(99, 97)
    reply = long_reply("node-0", 99, torch.randn(TAU), "0" * 16)
    assert task.since == 97
    assert len(protocol.encode(task)) + len(protocol.encode(reply)) < 8000
