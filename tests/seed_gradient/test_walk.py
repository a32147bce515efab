"""A node's local steps."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from fedtune_strategies.seed_gradient import local_walk, slopes
from fedtune_strategies.seed_gradient.slopes import Slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.seed_space.scaled import rms_scales, scaled
from tests.models import lm_loss, tiny_batches, tiny_model

K = 32


def weights(dtype=torch.float32):
    return {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(1)).to(dtype)}


def walk(answers, pool=None, base=None, **options):
    """Walk where every batch is the answer to it; returns the walk and the weights seen on the way."""
    base = base or weights()
    parameters, seen = {"w": torch.nn.Parameter(torch.empty_like(base["w"]))}, []

    def find(answer):
        seen.append(parameters["w"].detach().clone())
        return Slopes(*answer)

    options = {"step": 0.01} | options
    pool = pool or make_pool("walsh", 3, K)
    return local_walk(partial(pool.rebuild_model, parameters, base), pool, find, answers, **options), seen


def random_slopes(count, size=1.0):
    generator = torch.Generator().manual_seed(0)
    return [(1.0, size * torch.randn(K, generator=generator).double()) for _ in range(count)]


def test_the_walk_is_adam_with_one_second_moment_for_all():
    """Against torch's AdamW with amsgrad off, on slopes whose squares are all alike, where the two are the same."""
    signs = [g.sign() for _, g in random_slopes(12)]
    theta = torch.nn.Parameter(torch.zeros(K, dtype=torch.float64))
    adam = torch.optim.Adam([theta], lr=0.01 / math.sqrt(K), betas=(0.5, 0.999), eps=0.0)
    for sign in signs:
        theta.grad = 3 * sign
        adam.step()
    found, _ = walk([(1.0, 3 * sign) for sign in signs])
    torch.testing.assert_close(found.theta.double(), theta.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_step_sees_the_weights_rounded_once(dtype):
    pool, base = make_pool("walsh", 3, K), weights(dtype)
    _, seen = walk(random_slopes(5), pool, base)
    for steps, found in enumerate(seen):
        theta = walk(random_slopes(steps), pool, base)[0].theta
        assert torch.equal(found, pool.rebuild("w", base["w"], theta))
    assert torch.equal(base["w"], weights(dtype)["w"])


def test_a_step_changes_the_weights_by_the_asked_share_of_their_size():
    base = {"w": 5 * torch.randn(64, 64)}
    pool = scaled(make_pool("walsh", 3, K), rms_scales(base))
    _, seen = walk(random_slopes(2), pool, base, step=0.01)
    change = (seen[1] - seen[0]).square().mean().sqrt() / base["w"].square().mean().sqrt()
    assert float(change) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_size_of_the_loss_does_not_matter(size):
    torch.testing.assert_close(walk(random_slopes(6, size))[0].theta, walk(random_slopes(6))[0].theta)


def test_a_step_without_a_finite_loss_or_slope_is_skipped_and_counted():
    good = random_slopes(4)
    bad = [(math.nan, torch.zeros(K).double()), (1.0, torch.full((K,), math.inf).double())]
    found, _ = walk([good[0], bad[0], good[1], bad[1], *good[2:]])
    assert np.isnan(found.loss).tolist() == [False, True, False, True, False, False]
    assert torch.equal(found.theta, walk(good)[0].theta)


def test_slopes_of_zero_lead_nowhere():
    found, _ = walk([(1.0, torch.zeros(K).double())] * 3)
    assert not found.theta.any()


def test_a_model_learns():
    model = tiny_model()
    base = {name: parameter.detach().clone() for name, parameter in tuned_parameters(model).items()}
    parameters, pool = tuned_parameters(model), scaled(make_pool("walsh", 3, 1024), rms_scales(base))
    batch = tiny_batches(1)[0]
    found = local_walk(
        partial(pool.rebuild_model, parameters, base),
        pool,
        lambda batch: slopes(model, parameters, lm_loss, batch, pool),
        [batch] * 30,
        step=0.02,
    )
    assert found.loss[-1] < found.loss[0] - 1.0
