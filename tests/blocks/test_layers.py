import pytest
import torch

from fedtune_strategies.blocks.find import decoder_layers, find_blocks
from fedtune_strategies.blocks.layers import PrefixCache, without_layers
from fedtune_strategies.blocks.train import train_block
from tests.models import CONFIGS, lm_loss, tiny_batches, tiny_model


def count_runs(model):
    """How often the attention of each layer runs."""
    runs = [0, 0, 0]
    _, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        attention = next(child for child in layer.children() if "Attention" in type(child).__name__)

        def note(*_, index=index):
            runs[index] += 1

        attention.register_forward_hook(note)
    return runs


def same(first, second):
    assert first.losses == second.losses
    assert all(torch.equal(first.delta[name], second.delta[name]) for name in second.delta)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_prefix_and_checkpoints_change_no_bit(name):
    model, batches = tiny_model(name), tiny_batches(2)
    for block in find_blocks(model)[::2]:
        plain = train_block(model, block, lm_loss, batches, 3, 1e-2)
        same(train_block(model, block, lm_loss, batches, 3, 1e-2, cache_bytes=2**20, checkpoint=True), plain)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model)[1])


@pytest.mark.parametrize(("budget", "runs"), [(0, [6, 6, 6]), (2 * 12 * 16 * 4, [5, 5, 9]), (2**20, [3, 3, 9])])
def test_frozen_layers_run_once_a_batch_within_the_budget_and_twice_more_to_compare(budget, runs):
    model = tiny_model()
    counted = count_runs(model)
    block = next(block for block in find_blocks(model) if block.layer == 2)
    train_block(model, block, lm_loss, tiny_batches(2), 6, 1e-3, cache_bytes=budget)
    assert counted == runs


def test_cache_tells_several_passes_of_one_batch_apart():
    def two_passes(model, batch):
        return lm_loss(model, batch) + lm_loss(model, batch.flip(1))

    model, batches = tiny_model(), tiny_batches(2)
    block = next(block for block in find_blocks(model) if block.layer == 1)
    plain = train_block(model, block, two_passes, batches, 4, 1e-2)
    same(train_block(model, block, two_passes, batches, 4, 1e-2, cache_bytes=2**20), plain)


def test_cache_refuses_states_that_training_changes():
    """OPT's input projection is part of the block of outer norms, below all layers."""
    model, batches = tiny_model("opt"), tiny_batches(1)
    block = next(block for block in find_blocks(model) if block.kind == "norm")
    assert any("project_in" in name for name in block.parameters)
    counted = count_runs(model)
    train_block(model, block, lm_loss, batches, 3, 1e-2, cache_bytes=2**20)
    assert counted == [6, 6, 6]  # three steps, and three losses to compare


def test_checkpoints_run_the_layers_from_the_block_upwards_twice():
    model = tiny_model()
    counted = count_runs(model)
    block = next(block for block in find_blocks(model) if block.layer == 1)
    train_block(model, block, lm_loss, tiny_batches(1), 1, 1e-3, checkpoint=True)
    assert counted == [1, 2, 2]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_left_out_layer_does_not_run_and_the_others_do(name):
    model, batch = tiny_model(name).eval(), tiny_batches(1)[0]
    whole = lm_loss(model, batch).item()
    counted = count_runs(model)
    with without_layers(model, [1]):
        assert lm_loss(model, batch).item() != whole
    assert counted == [1, 0, 1]
    assert lm_loss(model, batch).item() == whole


def test_a_model_without_all_its_layers_is_its_embedding_norm_and_head():
    model, batch = tiny_model().eval(), tiny_batches(1)[0]
    with without_layers(model, range(3)), torch.no_grad():
        got = model(input_ids=batch).logits
    torch.testing.assert_close(got, model.lm_head(model.model.norm(model.model.embed_tokens(batch))))


def test_an_empty_prefix_needs_no_cache():
    with PrefixCache(2**20).installed([]):
        pass
