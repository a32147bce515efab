import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.fedcybgd.schedule import (
    ORDERS,
    local_steps_rule,
    nodes_for,
    turn_at,
)
from tests.conftest import quick


@quick
@given(st.integers(1, 9), st.integers(0, 5), st.sampled_from(ORDERS), st.integers(0, 2**63 - 1))
def test_a_cycle_visits_every_block_once(count, cycle, order, seed):
    blocks = [3 * index for index in range(count)]
    turns = [turn_at(cycle * count + position + 1, blocks, order, seed) for position in range(count)]
    assert sorted(turn.block for turn in turns) == blocks
    assert [(turn.cycle, turn.position) for turn in turns] == [(cycle, position) for position in range(count)]


def test_orders():
    assert [turn_at(t, [1, 2, 3]).block for t in range(1, 5)] == [1, 2, 3, 1]
    assert [turn_at(t, [1, 2, 3], "descending").block for t in range(1, 5)] == [3, 2, 1, 3]


def test_random_order_is_fixed_by_the_seed_and_drawn_for_each_cycle():
    blocks = list(range(8))
    drawn = [turn_at(t, blocks, "random", seed=7).block for t in range(1, 17)]
    assert drawn == [5, 4, 2, 3, 0, 6, 1, 7, 5, 2, 1, 7, 4, 3, 0, 6]
    assert drawn[:8] != drawn[8:]
    assert drawn != [turn_at(t, blocks, "random", seed=8).block for t in range(1, 17)]


@quick
@given(st.integers(1, 7), st.integers(1, 9))
def test_over_as_many_cycles_as_nodes_every_place_meets_every_node_once(node_count, blocks):
    nodes = [f"node-{i}" for i in range(node_count)]
    meetings = Counter((turn % blocks, nodes_for(turn, nodes, blocks)[0]) for turn in range(1, node_count * blocks + 1))
    assert len(meetings) == node_count * blocks
    assert set(meetings.values()) == {1}


@quick
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 200))
def test_no_node_works_more_than_one_turn_ahead(node_count, blocks, turns):
    nodes = [f"node-{i}" for i in range(node_count)]
    work = Counter(nodes_for(turn, nodes, blocks)[0] for turn in range(1, turns + 1))
    rounds = turns // math.lcm(blocks, node_count) * (math.lcm(blocks, node_count) // node_count)
    assert all(work[node] >= rounds for node in nodes)
    assert max(work.values()) - min(work[node] for node in nodes) <= 1


def test_substitutes_are_all_the_other_nodes():
    assert nodes_for(2, ["a", "b", "c"], 5) == ["b", "c", "a"]


@pytest.mark.parametrize(("examples", "steps"), [(0, 50), (3999, 50), (4800, 60), (10**6, 100)])
def test_local_steps_rule(examples, steps):
    assert local_steps_rule(examples, batch_size=8, num_blocks=10) == steps


def test_bad_schedules_give_clear_errors():
    with pytest.raises(ConfigError, match="unknown block order 'up'"):
        turn_at(1, [0, 1], "up")
    with pytest.raises(ConfigError, match="no block to train"):
        turn_at(1, [])
    with pytest.raises(ValueError, match="from 1"):
        turn_at(0, [1])
