"""Slopes of a loss along all directions: streamed, plain, and by autograd's whole gradient."""

import gc

import pytest
import torch

from fedtune_strategies.seed_gradient import rows, slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.seed_space.scaled import rms_scales, scaled
from tests.models import CONFIGS, lm_loss, tiny_batches, tiny_model

BATCH = tiny_batches(1)[0]


@pytest.fixture(params=["whole", "by rows"])
def sliced(request, monkeypatch):
    """Let every matrix count as large, and be cut into parts that split its rows."""
    if request.param == "by rows":
        for name, value in {"LARGE": 0, "PART": 128, "SHORT": 64}.items():
            monkeypatch.setattr(rows, name, value)


def directions(parameters, kind="walsh", seeds=64):
    return scaled(make_pool(kind, 3, seeds), rms_scales(parameters))


def by_autograd(model, parameters, pool):
    """The gradient of everything at once, then its inner products with the directions themselves."""
    gradients = torch.autograd.grad(lm_loss(model.eval(), BATCH), list(parameters.values()))
    total = torch.zeros(pool.size, dtype=torch.float64)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        for k in range(pool.size):
            total[k] += (pool.direction(name, parameter.shape, k).double() * gradient.double()).sum()
    return total


@pytest.mark.parametrize("architecture", CONFIGS)
def test_streamed_slopes_are_the_projection_of_the_whole_gradient(architecture, sliced):
    model = tiny_model(architecture)
    parameters = tuned_parameters(model)
    pool = directions(parameters)
    found = slopes(model, parameters, lm_loss, BATCH, pool)
    expected = by_autograd(model, parameters, pool)
    torch.testing.assert_close(found.g, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert found.loss == pytest.approx(lm_loss(model, BATCH).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
def test_both_kinds_of_directions_work(kind, sliced):
    model = tiny_model("llama-tied")
    parameters = tuned_parameters(model)
    pool = directions(parameters, kind, 40)
    expected = by_autograd(model, parameters, pool)
    found = slopes(model, parameters, lm_loss, BATCH, pool).g
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_checkpoints_change_no_bit(sliced):
    model = tiny_model()
    parameters = tuned_parameters(model)
    kept = slopes(model, parameters, lm_loss, BATCH, directions(parameters), checkpoint=False)
    assert torch.equal(slopes(model, parameters, lm_loss, BATCH, directions(parameters)).g, kept.g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_give_the_slopes_of_float32_up_to_their_rounding(dtype, sliced):
    half = tiny_model("llama-tied", dtype)
    whole = tiny_model("llama-tied")
    whole.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    expected = slopes(whole, tuned_parameters(whole), lm_loss, BATCH, directions(tuned_parameters(whole))).g
    found = slopes(half, tuned_parameters(half), lm_loss, BATCH, directions(tuned_parameters(whole))).g
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


def test_a_gradient_that_float16_cannot_hold_is_scaled_down():
    def steep(model, batch):
        return 100 * lm_loss(model, batch)

    half = tiny_model("llama", torch.float16)
    parameters = tuned_parameters(half)
    found = slopes(half, parameters, steep, BATCH, directions(parameters)).g
    gentle = slopes(half, parameters, lm_loss, BATCH, directions(parameters)).g
    assert torch.nn.functional.cosine_similarity(found, gentle, dim=0) > 0.99
    assert float(found.norm() / gentle.norm()) == pytest.approx(100, rel=0.05)


def test_only_what_is_tuned_counts(sliced):
    model = tiny_model()
    everything, part = tuned_parameters(model), tuned_parameters(model, r"layers\.1\.")
    pool = directions(everything)
    expected = by_autograd(model, part, pool)
    found = slopes(model, part, lm_loss, BATCH, pool).g
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_no_gradient_is_held_and_the_model_is_left_as_it_was(sliced):
    model = tiny_model("llama-tied").train()
    parameters = tuned_parameters(model)
    parameters["model.norm.weight"].requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    forwards = [module.forward for module in model.modules()]
    most = 0

    def watch(_):
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in parameters.values()))

    handles = [parameter.register_post_accumulate_grad_hook(watch) for parameter in list(parameters.values())[:-1]]
    slopes(model, parameters, lm_loss, BATCH, directions(parameters))
    for handle in handles:
        handle.remove()
    assert most <= 1
    assert all(parameter.grad is None for parameter in parameters.values())
    assert model.training and not parameters["model.norm.weight"].requires_grad
    assert [module.forward for module in model.modules()] == forwards
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_a_large_matrix_has_no_gradient_of_its_size(monkeypatch):
    """Watches every tensor that is alive when a part is projected: none is as large as the embedding's gradient."""
    vocabulary, width = 4096, 16
    model = tiny_model("llama-tied", vocab_size=vocabulary)
    monkeypatch.setattr(rows, "LARGE", 8192)
    monkeypatch.setattr(rows, "PART", 4096)
    parameters = tuned_parameters(model)
    weight = parameters["model.embed_tokens.weight"]
    pool, seen = directions(parameters), []

    def whole(tensor):
        return tensor.shape == weight.shape and tensor.data_ptr() != weight.data_ptr()

    project = rows._project

    def watched(*args):
        seen.append(sum(1 for one in gc.get_objects() if type(one) is torch.Tensor and whole(one)))
        return project(*args)

    monkeypatch.setattr(rows, "_project", watched)
    slopes(model, parameters, lm_loss, BATCH, pool)
    assert len(seen) > vocabulary * width // 4096 and max(seen) == 0 and weight.grad is None


def test_a_padding_row_is_not_trained_as_in_torch(monkeypatch):
    model = tiny_model("llama", pad_token_id=5)
    batch = torch.full((2, 6), 5)
    batch[:, ::2] = 7
    parameters = tuned_parameters(model, "embed_tokens")
    plain = slopes(model, parameters, lm_loss, batch, directions(parameters)).g
    monkeypatch.setattr(rows, "LARGE", 0)
    torch.testing.assert_close(slopes(model, parameters, lm_loss, batch, directions(parameters)).g, plain)


def test_a_loss_that_is_not_finite_gives_no_slopes():
    model = tiny_model()
    parameters = tuned_parameters(model)
    found = slopes(
        model, parameters, lambda model, batch: lm_loss(model, batch) * torch.nan, BATCH, directions(parameters)
    )
    assert found.loss != found.loss and not found.g.any()
