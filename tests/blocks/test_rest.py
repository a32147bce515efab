import pytest
import torch

from fedtune_strategies.blocks.find import Block, decoder_layers, find_blocks
from fedtune_strategies.blocks.gradients import block_gradients
from fedtune_strategies.blocks.rest import (
    blocks_inside,
    dropped_layers,
    layer_influence,
)
from fedtune_strategies.errors import ConfigError
from tests.models import CONFIGS, lm_loss, tiny_batches, tiny_model


def layer_block(layer, depth=1):
    return Block(0, f"layer {layer}", "layer", (), layer, depth)


@pytest.mark.parametrize("name", CONFIGS)
def test_influence_of_a_layer_that_does_nothing_is_zero(name):
    model = tiny_model(name).eval()
    _, layers = decoder_layers(model)
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.zero_()
    influence = layer_influence(model, tiny_batches(2), lm_loss)
    assert influence[1] == pytest.approx(0.0, abs=1e-6)
    assert influence[0] > 1e-4 and influence[2] > 1e-4


def test_influence_is_one_minus_the_cosine():
    model, batches = tiny_model().eval(), tiny_batches(2)
    distances = []
    for batch in batches:
        states = model(input_ids=batch, output_hidden_states=True).hidden_states
        distances.append(1 - torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1))
    assert layer_influence(model, batches, lm_loss)[0] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


def test_dropped_layers_are_the_least_influential_away_from_the_block():
    influence = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert dropped_layers(influence, 2, layer_block(7)) == (0, 1)
    assert dropped_layers(influence, 3, layer_block(1)) == (3, 4, 5)
    assert dropped_layers(influence, 2, layer_block(1, depth=3)) == (5, 6)
    assert dropped_layers(influence, 1, Block(0, "embedding", "embedding", ())) == (1,)
    assert dropped_layers(influence[::-1], 1, Block(0, "norm", "norm", ())) == (6,)
    with pytest.raises(ConfigError, match="cannot leave out 6 layers while layer 3 is trained"):
        dropped_layers(influence, 6, layer_block(3))


def test_a_block_lies_in_layers_left_out_only_if_all_of_it_does():
    model = tiny_model()
    assert blocks_inside(find_blocks(model), (0, 2)) == {1}  # the final norm beside layer 2 is needed
    assert blocks_inside(find_blocks(model, train_embeddings=False), (0, 2)) == {1, 3}
    assert blocks_inside(find_blocks(model, layers_per_block=2), (0, 2)) == set()


def gradient_of(model, block, batches):
    with block_gradients(model, block, lm_loss, batches) as gradient:
        return dict(zip(block.parameters, gradient(range(len(batches))).tensors, strict=True))


def test_block_gradient_is_that_of_autograd():
    model, batches = tiny_model(), tiny_batches(2)
    block = find_blocks(model)[2]
    got = gradient_of(model, block, batches)
    (lm_loss(model, batches[0]) / 2 + lm_loss(model, batches[1]) / 2).backward()
    for name in block.parameters:
        torch.testing.assert_close(got[name], model.get_parameter(name).grad)
