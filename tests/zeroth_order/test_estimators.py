"""Every estimator against the exact directional derivative, on plain and on language models."""

import numpy as np
import pytest
import torch
from torch import nn

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import local_steps
from tests.models import CONFIGS, make_model

EXACT = ["two-sided", "one-sided", "forward"]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().float()


def loss(model, batch):
    return (model(batch).float() ** 2).mean()


def language_loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def exact(model, pool, loss, batch, seeds):
    model.zero_grad()
    loss(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in tuned_parameters(model).items()}
    model.zero_grad()
    return [sum((g * pool.direction(name, g.shape, k)).sum().item() for name, g in grads.items()) for k in seeds]


@pytest.mark.parametrize(
    ("estimator", "eps", "rtol"), [("two-sided", 1e-3, 2e-3), ("one-sided", 1e-4, 2e-2), ("forward", 1e9, 1e-4)]
)
@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
def test_a_slope_is_the_directional_derivative(estimator, eps, rtol, kind):
    model, pool, batch, seeds = small_model(), make_pool(kind, 3, 16), torch.randn(20, 6), [5, 2, 11]
    expected = exact(model, pool, loss, batch, seeds)
    found = local_steps(model, pool, loss, [batch], seeds, eps=eps, lr=0.0, estimator=estimator, directions=3)
    np.testing.assert_allclose(found.g, expected, rtol=rtol, atol=rtol * np.abs(expected).max())
    np.testing.assert_allclose(found.loss, float(loss(model, batch)), rtol=1e-2)


def test_signs():
    model, pool, batch, seeds = small_model(), make_pool("walsh", 3, 16), torch.randn(20, 6), list(range(10))
    expected = np.sign(exact(model, pool, loss, batch, seeds))
    found = local_steps(model, pool, loss, [batch], seeds, eps=1e-3, lr=0.0, estimator="sign", directions=10)
    assert np.array_equal(found.g, expected) and len(set(expected)) == 2


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen2", "gpt-neox"])
def test_forward_mode_is_exact_on_language_models(name):
    model, pool = make_model(CONFIGS[name]).eval(), make_pool("walsh", 3, 64)
    ids = torch.randint(0, 60, (2, 12))
    expected = exact(model, pool, language_loss, ids, [5, 9])
    found = local_steps(model, pool, language_loss, [ids], [5, 9], eps=1.0, lr=0.0, estimator="forward", directions=2)
    np.testing.assert_allclose(found.g, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", [*EXACT, "sign"])
@pytest.mark.parametrize("directions", [1, 4])
def test_the_model_ends_where_the_scalars_say(estimator, directions):
    model, pool = small_model(), make_pool("walsh", 3, 16)
    base = {name: p.detach().clone() for name, p in tuned_parameters(model).items()}
    batches, seeds = [torch.randn(20, 6) for _ in range(30)], np.random.default_rng(0).integers(0, 16, 30)
    steps = local_steps(
        model, pool, loss, batches, seeds, eps=1e-3, lr=1e-3, estimator=estimator, directions=directions
    )
    theta = torch.zeros(16)
    for k, g in zip(seeds, steps.g, strict=True):
        theta[int(k)] -= 1e-3 * float(g)
    for name, p in tuned_parameters(model).items():
        torch.testing.assert_close(p.detach(), pool.rebuild(name, base[name], theta), rtol=0, atol=1e-5)


@pytest.mark.parametrize("estimator", [*EXACT, "sign"])
def test_a_loss_that_is_not_finite_skips_its_steps(estimator):
    model, pool = small_model(), make_pool("walsh", 3, 16)
    batches = [torch.full((2, 6), torch.nan), torch.randn(2, 6)]
    found = local_steps(model, pool, loss, batches, [1, 2, 3, 4], eps=1e-3, lr=1e-3, estimator=estimator, directions=2)
    assert np.isnan(found.g[:2]).all() and np.isfinite(found.g[2:]).all()


def test_forward_mode_says_where_it_cannot_work():
    model, pool, batch = small_model().bfloat16(), make_pool("walsh", 3, 16), torch.randn(20, 6).bfloat16()
    with pytest.raises(ConfigError, match="float32 weights in memory"):
        local_steps(model, pool, loss, [batch], [1], eps=1e-3, lr=0.0, estimator="forward")
