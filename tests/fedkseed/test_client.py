"""Theta as a node holds it: always the server's, whatever rounds the node has missed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune_strategies.config.node import NodeConfig
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedkseed.client import FedKSeedClient
from fedtune_strategies.fedkseed.messages import SeedTask
from fedtune_strategies.fedkseed.pools import pool_number
from fedtune_strategies.fedkseed.versions import Versions
from fedtune_strategies.method import NodeContext
from fedtune_strategies.run_config import parse

K = 8


def make_node(**changes):
    model = nn.Linear(2, 2)
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    return FedKSeedClient(NodeContext(parse({"fedkseed.seeds": K} | changes), "a", model, base, [], NodeConfig()))


def seed_task(round, since, change):
    empty = torch.empty(0)
    return SeedTask(round, since, change, 1.0, empty, empty, 1.0, 1.0, 1.0)


@given(st.integers(0, 3), st.lists(st.sampled_from(["asked", "asked twice", "missed", "restarted"]), max_size=12))
def test_a_node_holds_the_server_s_theta_of_every_pool(every, fates):
    changes = {"fedkseed.pool-every": every}
    node, config, versions = make_node(**changes), parse({"fedkseed.seeds": K} | changes), Versions()
    random, rows = np.random.default_rng(len(fates)), [np.zeros(K, dtype=np.int32)]
    for round, fate in enumerate(fates, start=1):
        versions.add(round - 1, rows)
        if fate == "restarted":
            node = make_node(**changes)
        if fate != "missed":
            for _ in range(1 + (fate == "asked twice")):
                task = seed_task(round, *versions.change(versions.since("a"), round - 1))
                if not node.take(task):
                    versions.forget("a")
                    assert node.take(seed_task(round, *versions.change(versions.since("a"), round - 1)))
                assert np.array_equal(node._units, rows)
            versions.hold("a", round - 1)
        rows = [*rows[:-1], rows[-1] + random.integers(-100, 100, K, dtype=np.int32)]
        if pool_number(config, round + 1) == len(rows):
            rows.append(np.zeros(K, dtype=np.int32))


def test_a_change_for_another_number_of_pools_is_refused():
    versions = Versions()
    versions.add(4, [np.ones(K, dtype=np.int32)])
    with pytest.raises(ProtocolError):
        make_node(**{"fedkseed.pool-every": 2}).take(seed_task(5, *versions.change(0, 4)))
