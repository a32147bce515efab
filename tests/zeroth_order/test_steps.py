"""Local steps against exact slopes."""

import numpy as np
import torch
from torch import nn

from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import local_steps


def linear_model():
    torch.manual_seed(0)
    return nn.Linear(6, 3).double().float()


def loss(model, batch):
    return (model(batch) ** 2).mean()


def test_scalar_is_the_directional_derivative():
    model, pool, batch = linear_model(), make_pool("gaussian", 3, 8), torch.randn(20, 6)
    loss(model, batch).backward()
    exact = sum((p.grad * pool.direction(name, p.shape, 5)).sum() for name, p in tuned_parameters(model).items())
    found = local_steps(model, pool, loss, [batch], [5], eps=1e-2, lr=0.0)
    np.testing.assert_allclose(found.g, [exact.item()], rtol=1e-3)


def test_model_ends_at_the_point_that_the_scalars_name():
    model, pool = linear_model(), make_pool("walsh", 3, 8)
    base = {name: p.detach().clone() for name, p in tuned_parameters(model).items()}
    batches, seeds = [torch.randn(20, 6) for _ in range(30)], np.random.default_rng(0).integers(0, 8, 30)
    found = local_steps(model, pool, loss, batches, seeds, eps=1e-3, lr=1e-2)
    theta = torch.zeros(8)
    for k, g in zip(seeds, found.g, strict=True):
        theta[int(k)] -= 1e-2 * float(g)
    for name, p in tuned_parameters(model).items():
        torch.testing.assert_close(p.detach(), pool.rebuild(name, base[name], theta), rtol=0, atol=1e-5)
    assert found.loss[-5:].mean() < found.loss[:5].mean()


def test_a_non_finite_loss_skips_the_step():
    model, pool = linear_model(), make_pool("walsh", 3, 8)
    before = [p.detach().clone() for p in model.parameters()]
    found = local_steps(model, pool, loss, [torch.full((2, 6), torch.inf)], [1], eps=1e-3, lr=1.0)
    assert np.isnan(found.g).all()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=1e-6)


def test_dropout_is_off_during_steps_and_the_mode_restored():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.9)).train()
    pool, batch = make_pool("walsh", 3, 8), torch.randn(20, 6)
    first, second = (local_steps(model, pool, loss, [batch], [2], eps=1e-3, lr=0.0).loss for _ in range(2))
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert model.training
