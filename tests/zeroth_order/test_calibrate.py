"""Step size and distance found on losses whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.zeroth_order.calibrate import DISTANCES, calibrate

POOL = make_pool("walsh", 3, 16)
SEEDS = range(6)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(30, 20, bias=False).to(dtype)


def parabola(curvature):
    """A loss of that curvature along every direction: the direction's length is the square root of 600."""
    return lambda model, batch: curvature / 600 * (model.weight.double() - 0.5).square().sum() / 2


def test_the_step_is_a_tenth_of_the_way_to_the_lowest_point():
    found = calibrate(model(), POOL, parabola(400.0), None, SEEDS)
    assert found.lr == pytest.approx(0.1 / 400, rel=1e-2)
    assert found.eps in DISTANCES and found.noise < 1e-3


def test_a_loss_without_curvature_limits_the_step_to_the_widest_distance():
    found = calibrate(model(), POOL, lambda model, batch: model.weight.double().sum(), None, SEEDS)
    slopes = [float(POOL.direction("weight", (20, 30), k).sum()) for k in SEEDS]
    assert found.lr <= DISTANCES[-1] / np.sqrt(np.mean(np.square(slopes))) * 1.01


def test_rounding_asks_for_more_distance_and_curvature_for_less():
    def bent(model, batch):
        return (3 * model.weight.double()).sin().sum()

    def coarse(model, batch):
        return (bent(model, batch) * 2000).round() / 2000

    exact, rounded = (calibrate(model(), POOL, loss, None, SEEDS) for loss in (bent, coarse))
    assert exact.eps < rounded.eps
    assert exact.noise < rounded.noise < 0.5


def test_noise_is_told_where_there_is_nothing_else():
    random = np.random.default_rng(0)
    found = calibrate(model(), POOL, lambda model, batch: random.normal(), None, SEEDS, lr=1e-3, eps=1e-3)
    assert found.noise > 0.7 and (found.lr, found.eps) == (1e-3, 1e-3)
    flat = calibrate(model(), POOL, lambda model, batch: 1.0, None, SEEDS, lr=1e-3, eps=1e-3)
    assert flat.noise == 1.0


def test_what_is_given_costs_25_losses_and_is_kept():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return model.weight.square().sum()

    assert calibrate(model(), POOL, loss, None, SEEDS, lr=2.0, eps=1e-3).lr == 2.0
    assert len(calls) == 25
    assert calibrate(model(), POOL, loss, None, SEEDS, eps=2e-3).eps == 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_ends_where_it_began(dtype):
    probed, before = model(dtype), model(dtype)
    calibrate(probed, POOL, parabola(400.0), None, SEEDS)
    torch.testing.assert_close(probed.weight, before.weight, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_a_loss_that_is_never_finite_gives_no_answer():
    found = calibrate(model(), POOL, lambda model, batch: math.nan, None, SEEDS)
    assert math.isnan(found.lr) and math.isnan(found.eps)


def test_a_step_by_signs_is_as_long_as_one_by_slopes():
    by_slopes, by_signs = (
        calibrate(model(), POOL, parabola(400.0), None, SEEDS, signs=signs) for signs in (False, True)
    )
    gradient = 400 / 600 * (model().weight.detach() - 0.5)
    slopes = [float((gradient * POOL.direction("weight", (20, 30), k)).sum()) for k in SEEDS]
    assert by_signs.lr == pytest.approx(by_slopes.lr * np.sqrt(np.mean(np.square(slopes))), rel=1e-2)


def test_a_loss_that_falls_at_the_widest_distance_is_judged_by_the_next_that_rises():
    """A rise up to a distance of 0.01 and a fall beyond: at 0.03 the loss shows no positive curvature."""
    start = model().weight.detach().double()

    def ridge(model, batch):
        moved = (model.weight.double() - start).square().mean()  # squared distance: directions have elements of ±1
        return 400 / 2 * (moved - moved.square() / 4e-4) + model.weight.double().sum()

    curvature = 2 * 400 / 2 * (1 - 0.01**2 / 4e-4)  # at a distance of 0.01
    assert calibrate(model(), POOL, ridge, None, SEEDS).lr == pytest.approx(0.1 / curvature, rel=1e-2)


def test_a_loss_that_falls_everywhere_keeps_the_caution():
    start = model().weight.detach().double()

    def cap(model, batch):
        return model.weight.double().sum() - (model.weight.double() - start).square().sum()

    slopes = [float(POOL.direction("weight", (20, 30), k).sum()) for k in SEEDS]
    found = calibrate(model(), POOL, cap, None, SEEDS)
    assert found.lr <= 0.1 * DISTANCES[-1] / np.sqrt(np.mean(np.square(slopes))) * 1.01
