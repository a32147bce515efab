"""Local steps against exact slopes, in both ways, for all dtypes."""

import numpy as np
import pytest
import torch
from torch import nn

from fedtune_strategies.divergence import check_losses
from fedtune_strategies.errors import DivergenceError
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import local_steps

ways = pytest.mark.parametrize("in_place", [True, False])


def linear_model():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def loss(model, batch):
    return (model(batch).float() ** 2).mean()


def weights(model):
    return {name: p.detach().clone() for name, p in tuned_parameters(model).items()}


@ways
def test_scalar_is_the_directional_derivative(in_place):
    model, pool, batch = linear_model(), make_pool("gaussian", 3, 8), torch.randn(20, 6)
    loss(model, batch).backward()
    exact = sum((p.grad * pool.direction(name, p.shape, 5)).sum() for name, p in tuned_parameters(model).items())
    found = local_steps(model, pool, loss, [batch], [5], eps=1e-2, lr=0.0, in_place=in_place)
    np.testing.assert_allclose(found.g, [exact.item()], rtol=1e-3)


@ways
def test_model_ends_at_the_point_that_the_scalars_name(in_place):
    model, pool = linear_model(), make_pool("walsh", 3, 8)
    base = weights(model)
    batches, seeds = [torch.randn(20, 6) for _ in range(30)], np.random.default_rng(0).integers(0, 8, 30)
    found = local_steps(model, pool, loss, batches, seeds, eps=1e-3, lr=1e-2, in_place=in_place)
    theta = torch.zeros(8)
    for k, g in zip(seeds, found.g, strict=True):
        theta[int(k)] -= 1e-2 * float(g)
    for name, p in tuned_parameters(model).items():
        torch.testing.assert_close(p.detach(), pool.rebuild(name, base[name], theta), rtol=0, atol=1e-5)
    assert found.loss[-5:].mean() < found.loss[:5].mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_far_below_a_unit_in_the_last_place_survive_16_bits(dtype):
    model = nn.Linear(64, 64, bias=False).to(dtype)
    nn.init.constant_(model.weight, 1.0)
    pool, base = make_pool("walsh", 3, 64), weights(model)
    batches = [torch.randn(4, 64).to(dtype)] * 100
    found = local_steps(model, pool, loss, batches, [5] * 100, eps=0.05, lr=1e-6)
    moved = -1e-6 * float(found.g.sum())
    assert abs(1e-6 * found.g).max() < 2**-12  # each step alone would round to nothing
    expected = pool.perturb("weight", base["weight"], 5, moved)
    assert torch.equal(model.weight.detach(), expected)


@ways
def test_a_non_finite_loss_skips_the_step(in_place):
    model, pool = linear_model(), make_pool("walsh", 3, 8)
    before = weights(model)
    batch = torch.full((2, 6), torch.inf)
    found = local_steps(model, pool, loss, [batch], [1], eps=1e-3, lr=1.0, in_place=in_place)
    assert np.isnan(found.g).all() and np.isnan(found.loss).all()
    for name, weight in weights(model).items():
        torch.testing.assert_close(before[name], weight, rtol=0, atol=1e-6)


def test_from_a_start_the_weights_stay_at_the_base():
    model, pool, batch = linear_model(), make_pool("walsh", 3, 8), torch.randn(20, 6)
    before, theta = weights(model), torch.randn(8) * 0.1
    found = local_steps(model, pool, loss, [batch] * 5, [1, 2, 3, 1, 2], eps=1e-3, lr=1e-2, start=theta)
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    pool.rebuild_model(tuned_parameters(model), before, theta)
    again = local_steps(model, pool, loss, [batch] * 5, [1, 2, 3, 1, 2], eps=1e-3, lr=1e-2)
    np.testing.assert_allclose(found.g, again.g, rtol=1e-2, atol=1e-3)


def test_dropout_is_off_during_steps_and_the_mode_restored():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.9)).train()
    pool, batch = make_pool("walsh", 3, 8), torch.randn(20, 6)
    first, second = (local_steps(model, pool, loss, [batch], [2], eps=1e-3, lr=0.0).loss for _ in range(2))
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert model.training


def test_a_walk_whose_loss_rises_and_rises_is_stopped_with_a_word():
    taken = []

    def rising(model, batch):
        taken.append(batch)
        return torch.tensor(2.0 + batch)

    with pytest.raises(DivergenceError, match=r"rose from .* nats within 16 local steps, .*set 'train.lr' lower"):
        local_steps(linear_model(), make_pool("walsh", 3, 8), rising, range(200), [1] * 200, eps=1e-3, lr=0.0)
    assert max(taken) == 15


def test_only_a_rise_beyond_what_batches_differ_by_is_a_divergence():
    check_losses(np.random.default_rng(0).normal(3.0, 1.0, 400))
    check_losses([9.0] * 20 + [np.nan, np.inf] * 8 + [2.0] * 20)
    for diverged in ([2.0] * 20 + [5.0] * 8, [2.0] + [12.0] * 16):
        with pytest.raises(DivergenceError, match="the loss rose"):
            check_losses(diverged)
