import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.train import apply_delta, train_block, weighted_mean
from tests.conftest import quick
from tests.models import CONFIGS, lm_loss, tiny_batches, tiny_model


def block_of(model, name):
    return next(block for block in find_blocks(model) if block.name == name)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_of_every_architecture_learns_and_the_model_stays_as_it_was(name):
    model = tiny_model(name).train()
    before, batches = snapshot(model), tiny_batches(1)
    for block in find_blocks(model):
        update = train_block(model, block, lm_loss, batches, steps=3, lr=1e-2)
        assert tuple(update.delta) == block.parameters
        assert all(change.dtype == torch.float32 for change in update.delta.values())
        assert any(change.abs().max() > 0 for change in update.delta.values())
        assert update.losses[-1] < update.losses[0]
        assert (update.steps, update.skipped) == (3, 0)
        assert update.grad_norm > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_steps_equal_plain_adamw_on_the_block():
    model = tiny_model()
    block, batches = block_of(model, "layer 1"), tiny_batches(2)
    update = train_block(model, block, lm_loss, batches, 5, lambda step: 1e-2 / (step + 1), weight_decay=0.1)

    plain = copy.deepcopy(model).eval()
    trained = [plain.get_parameter(name) for name in block.parameters]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.zero_grad()
        lm_loss(plain, batches[step % 2]).backward()
        optimizer.step()
    for name, parameter in zip(block.parameters, trained, strict=True):
        assert torch.equal(update.delta[name], parameter.detach() - model.get_parameter(name).detach())


def test_backward_stops_at_the_block():
    """Nothing below the block takes part in autograd: its outputs need no gradient and no node of the graph is its."""
    model = tiny_model()
    needed = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *args, index=index: needed.update({index: args[2].requires_grad}))
    gradients = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.append(name))
    train_block(model, block_of(model, "layer 1"), lm_loss, tiny_batches(1), 1, 1e-3)
    assert needed == {0: False, 1: True, 2: True}
    assert gradients and all(name.startswith("model.layers.1.") for name in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_train_a_float32_copy_from_the_exact_block(dtype):
    model = tiny_model(dtype=dtype)
    before, block = snapshot(model), block_of(model, "layer 1")
    exact = {name: model.get_parameter(name).detach().float() + 1e-6 for name in block.parameters}
    update = train_block(model, block, lm_loss, tiny_batches(2), 30, 1e-7, start=exact)
    largest = max(change.abs().max().item() for change in update.delta.values())
    assert 1e-6 < largest < 1e-5  # steps far below the spacing of 16-bit numbers add up
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_losses_that_are_not_finite_are_skipped_and_counted():
    model = tiny_model()
    block, batches = block_of(model, "layer 0"), tiny_batches(1)
    calls = []

    def sometimes_broken(model, batch):
        calls.append(1)
        return lm_loss(model, batch) * (math.nan if len(calls) in (2, 4) else 1.0)

    update = train_block(model, block, sometimes_broken, batches, 5, 1e-3)
    clean = train_block(model, block, lm_loss, batches, 3, 1e-3)
    assert (update.steps, update.skipped) == (3, 2)
    assert update.losses == clean.losses
    assert all(torch.equal(update.delta[name], clean.delta[name]) for name in block.parameters)

    lost = train_block(model, block, lambda m, b: lm_loss(m, b) * math.inf, batches, 2, 1e-3)
    assert (lost.steps, lost.skipped, lost.losses) == (0, 2, [])
    assert math.isnan(lost.grad_norm) and not any(change.any() for change in lost.delta.values())


def test_gradients_that_are_not_finite_are_skipped():
    model = tiny_model()
    block = block_of(model, "layer 0")

    def infinite_slope(model, batch):
        return lm_loss(model, batch) + torch.sqrt(0.0 * model.get_parameter(block.parameters[0])).sum()

    update = train_block(model, block, infinite_slope, tiny_batches(1), 2, 1e-3)
    assert (update.steps, update.skipped) == (0, 2)


def test_accumulated_batches_make_one_step():
    model = tiny_model()
    block, batches = block_of(model, "layer 1"), tiny_batches(2)
    small = train_block(model, block, lm_loss, batches, 2, 1e-2, accumulate=2)
    large = train_block(model, block, lm_loss, [torch.cat(batches)], 2, 1e-2)
    assert small.losses == pytest.approx(large.losses, rel=1e-5)
    assert small.grad_norm == pytest.approx(large.grad_norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(dtype):
    model, batches = tiny_model(), tiny_batches(1)
    block = block_of(model, "layer 1")
    full = train_block(model, block, lm_loss, batches, 4, 1e-2)
    cast = train_block(model, block, lm_loss, batches, 4, 1e-2, autocast=dtype)
    assert cast.skipped == 0 and cast.losses != full.losses
    assert cast.losses == pytest.approx(full.losses, rel=0.02)
    assert cast.grad_norm == pytest.approx(full.grad_norm, rel=0.1)


def test_a_loss_scale_that_overflows_is_lowered_and_no_step_lost():
    model = tiny_model(dtype=torch.float16)
    update = train_block(
        model, block_of(model, "layer 1"), lambda m, b: lm_loss(m, b) * 1000, tiny_batches(1), 12, 1e-3
    )
    assert (update.steps, update.skipped) == (12, 0) and math.isfinite(update.grad_norm)


def test_a_mean_weighs_by_examples():
    deltas = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, -2.0])}]
    assert weighted_mean(deltas, [3, 1])["w"].tolist() == [2.0, 1.0]


def test_an_error_leaves_the_model_as_it_was():
    model = tiny_model()
    before, calls = snapshot(model), []

    def breaks(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return lm_loss(model, batch)

    with pytest.raises(RuntimeError, match="power cut"):
        train_block(model, block_of(model, "layer 0"), breaks, tiny_batches(1), 5, 1e-2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@quick
@given(st.floats(-10, 10, width=32), st.floats(-1, 1, width=32), st.floats(0.1, 2.0))
def test_apply_delta_rounds_product_and_sum_once_each(weight, change, gamma):
    import numpy as np

    got = apply_delta({"w": torch.tensor([weight])}, {"w": torch.tensor([change])}, gamma)["w"].item()
    assert got == float(np.float32(weight) + np.float32(change) * np.float32(gamma))


def test_training_all_blocks_in_turn_lowers_the_loss():
    model, batches = tiny_model(), tiny_batches(1)
    first = lm_loss(model, batches[0]).item()
    for block in find_blocks(model):
        update = train_block(model, block, lm_loss, batches, 10, 1e-2)
        old = {name: model.get_parameter(name).detach() for name in block.parameters}
        for name, value in apply_delta(old, update.delta).items():
            model.get_parameter(name).data.copy_(value)
    assert lm_loss(model, batches[0]).item() < first - 1.0


def test_a_change_made_on_a_gpu_meets_a_start_on_the_cpu():
    """Fake tensors on "meta" stand for a GPU: they refuse to meet those on the CPU, also without one."""
    with FakeTensorMode():
        with torch.device("meta"):
            model = tiny_model()
        block = find_blocks(model)[1]
        start = {name: torch.empty(model.get_parameter(name).shape) for name in block.parameters}
        update = train_block(model, block, lm_loss, [], 0, 1e-2, start=start)
        assert {value.device.type for value in update.delta.values()} == {"cpu"}
        on_gpu = {name: value.to("meta") for name, value in update.delta.items()}
        for committed in (apply_delta(start, on_gpu), weighted_mean([start, on_gpu], [1.0, 2.0])):
            assert {value.device.type for value in committed.values()} == {"cpu"}
