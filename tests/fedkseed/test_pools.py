"""Pools one after another: keys, and weights rebuilt from theta of all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.fedkseed.pools import nth_pool, pool_number, rebuild
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_space import make_pool

K = 16
CONFIG = parse({"fedkseed.seeds": K, "fedkseed.pool-every": 2, "train.seed": 7})


def points(count):
    random = np.random.default_rng(0)
    return [random.normal(size=K).astype(np.float32) / 100 for _ in range(count)]


@given(st.integers(1, 10_000), st.integers(1, 50))
def test_every_n_rounds_have_a_pool(round, every):
    config = parse({"fedkseed.pool-every": every})
    assert pool_number(config, round) * every < round <= (pool_number(config, round) + 1) * every
    assert pool_number(parse({}), round) == 0


def test_the_first_pool_is_that_of_a_run_without_more_and_all_differ():
    keys = [nth_pool(CONFIG, number).key for number in range(50)]
    assert keys[0] == 7 and len(set(keys)) == 50
    assert nth_pool(parse({"train.seed": 8}), 1).key not in keys


@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
def test_weights_are_the_sum_over_all_pools(kind):
    config = parse({"fedkseed.seeds": K, "fedkseed.pool-every": 2, "fedkseed.pool": kind})
    base, weight = torch.randn(9, 11), torch.empty(9, 11)
    rebuild(config, points(3), {"w": weight}, {"w": base})
    expected = base.double()
    for number, theta in enumerate(points(3)):
        for k, value in enumerate(theta):
            expected += float(value) * nth_pool(config, number).direction("w", base.shape, k).double()
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(dtype):
    base = {"w": torch.randn(40, 50).to(dtype)}
    half, whole = torch.empty(40, 50, dtype=dtype), torch.empty(40, 50)
    rebuild(CONFIG, points(4), {"w": half}, base)
    rebuild(CONFIG, points(4), {"w": whole}, {"w": base["w"].float()})
    assert torch.equal(half, whole.to(dtype))


def test_one_pool_is_rebuilt_as_ever():
    base, weight = torch.randn(40, 50), torch.empty(40, 50)
    rebuild(CONFIG, points(1), {"w": weight}, {"w": base})
    assert torch.equal(weight, make_pool("walsh", 7, K).rebuild("w", base, torch.from_numpy(points(1)[0])))


def test_the_base_model_is_left_alone():
    base = torch.randn(4, 5)
    before = base.clone()
    rebuild(CONFIG, points(2), {"w": torch.empty(4, 5)}, {"w": base})
    assert torch.equal(base, before)
