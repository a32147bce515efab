import copy

import pytest
import torch

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.language.adapters import add_adapters, sharing_weights, weight_changes
from tests.models import CONFIGS, make_model

IDS = torch.tensor([[1, 5, 9, 2, 7]])


@pytest.mark.parametrize(("name", "targets"), [("llama", ""), ("llama", "all-linear"), ("gpt2", "")])
def test_merged_weights_compute_what_the_adapted_model_computes(name, targets):
    model = make_model(CONFIGS[name]).eval()
    merged, adapted = copy.deepcopy(model), sharing_weights(model)
    adapters = add_adapters(adapted, 3, 5, targets, seed=0)
    with torch.no_grad():
        assert torch.equal(adapted(IDS).logits, model(IDS).logits), "new adapters change nothing"
        for adapter in adapters.values():
            adapter.add_(torch.randn_like(adapter) / 8)
        for weight, change in weight_changes(adapted):
            merged.get_parameter(weight).add_(change)
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits)
        assert not torch.allclose(merged(IDS).logits, model(IDS).logits)


def test_a_copy_shares_the_weights_and_leaves_the_model_its_modules():
    model = make_model(CONFIGS["llama"])
    names = [name for name, _ in model.named_parameters()]
    adapters = add_adapters(sharing_weights(model), 8, 16, "", seed=0)
    assert [name for name, _ in model.named_parameters()] == names
    shared = sharing_weights(model)
    pairs = list(zip(shared.parameters(), model.parameters(), strict=True))
    assert all(copied.data_ptr() == own.data_ptr() for copied, own in pairs)
    assert all(own.requires_grad for _, own in pairs)
    assert adapters and not set(adapters) & set(names)


def test_the_start_depends_on_the_seed_alone():
    def start(seed):
        torch.rand(3)
        return add_adapters(make_model(CONFIGS["llama"]), 8, 16, "", seed)

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_targets_that_are_not_there_are_one_line():
    with pytest.raises(ConfigError, match=r"lora\.targets.*nonsense") as caught:
        add_adapters(make_model(CONFIGS["llama"]), 8, 16, "nonsense", seed=0)
    assert "\n" not in str(caught.value)
