"""Step size and distance found on losses whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.zeroth_order.calibrate import calibrate, default_distance

POOL = make_pool("walsh", 3, 16)
SEEDS = range(6)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(30, 20, bias=False).to(dtype)


def parabola(curvature):
    """A loss of that curvature along every direction: the direction's length is the square root of 600."""
    return lambda model, batch: curvature / 600 * (model.weight.double() - 0.5).square().sum() / 2


def test_one_step_is_a_tenth_of_the_way_to_the_lowest_point():
    found = calibrate(model(), POOL, parabola(400.0), None, SEEDS, eps=1e-3, steps=1)
    assert found.lr == pytest.approx(0.1 / 400, rel=1e-2) and found.noise < 1e-3


def test_many_steps_together_cost_a_fiftieth_of_a_nat_by_curvature():
    theta, walked = np.zeros(16), np.random.default_rng(0)
    slopes = [
        float(POOL.direction("weight", (20, 30), k).mul(model().weight.detach() - 0.5).sum()) * 400 / 600 for k in SEEDS
    ]
    found = calibrate(model(), POOL, parabola(400.0), None, SEEDS, eps=1e-3, steps=3000)
    length = found.lr * np.sqrt(np.mean(np.square(slopes)))
    np.add.at(theta, walked.integers(0, 16, 3000), length * walked.normal(size=3000))
    assert 400 / 2 * np.square(theta).sum() == pytest.approx(0.02, rel=0.7)


def test_a_loss_without_curvature_limits_the_step_to_the_widest_distance():
    found = calibrate(model(), POOL, lambda model, batch: model.weight.double().sum(), None, SEEDS, eps=3e-3, steps=1)
    slopes = [float(POOL.direction("weight", (20, 30), k).sum()) for k in SEEDS]
    assert found.lr <= 3e-2 / np.sqrt(np.mean(np.square(slopes))) * 1.01


def test_noise_is_told_where_there_is_nothing_else():
    random = np.random.default_rng(0)
    assert calibrate(model(), POOL, lambda *_: random.normal(), None, SEEDS, eps=1e-3, steps=20).noise > 0.7
    assert calibrate(model(), POOL, lambda *_: 1.0, None, SEEDS, eps=1e-3, steps=20).noise == 1.0


def test_it_costs_37_losses():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return model.weight.square().sum()

    calibrate(model(), POOL, loss, None, SEEDS, eps=1e-3, steps=20)
    assert len(calls) == 37


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_ends_where_it_began(dtype):
    probed, before = model(dtype), model(dtype)
    calibrate(probed, POOL, parabola(400.0), None, SEEDS, eps=1e-3, steps=20)
    torch.testing.assert_close(probed.weight, before.weight, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_a_loss_that_is_never_finite_gives_no_answer():
    assert math.isnan(calibrate(model(), POOL, lambda *_: math.nan, None, SEEDS, eps=1e-3, steps=20).lr)


def test_16_bit_losses_are_compared_farther_apart():
    distances = [default_distance([torch.zeros(1), torch.zeros(1, dtype=dtype)]) for dtype in DTYPES]
    assert distances == [1e-3, 3e-3, 1e-2]
    assert default_distance([]) == 1e-3
