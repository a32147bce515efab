import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.blocks.codecs import decode, encode
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.offload import empty_model, empty_parameters, offloaded
from fedtune_strategies.blocks.train import train_block
from tests.models import CONFIGS, lm_loss, tiny_batches, tiny_model


def rest_of(model, block):
    """Coded frozen matrices of a model; the model itself is changed to what they decode to."""
    weights = {n: p.detach() for n, p in model.named_parameters() if n not in block.parameters and p.dim() > 1}
    parts = encode(weights, Codec("int8"))
    for name, value in decode(parts).items():
        model.get_parameter(name).data.copy_(value)
    return list(weights), parts


def coded_loader(parts):
    return lambda name: decode({key: part for key, part in parts.items() if key.split(":")[0] == name})[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_held_weights_train_to_the_same_bits(name, checkpoint):
    model, batches = tiny_model(name), tiny_batches(2)
    for block in find_blocks(model)[:3:2]:
        names, parts = rest_of(model, block)
        plain = train_block(model, block, lm_loss, batches, 3, 1e-2)
        with offloaded(model, names, coded_loader(parts)):
            held = train_block(model, block, lm_loss, batches, 3, 1e-2, checkpoint=checkpoint)
        assert held.losses == plain.losses
        assert all(torch.equal(held.delta[key], plain.delta[key]) for key in plain.delta)


def test_no_decoded_layer_outlives_its_use():
    model, batch = tiny_model(), tiny_batches(1)[0]
    names, parts = rest_of(model, find_blocks(model)[1])
    decode_one, alive, most = coded_loader(parts), set(), []

    def watched(name):
        array = decode_one(name).numpy().copy()
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most.append(len(alive))
        return torch.from_numpy(array)

    with offloaded(model, names, watched):
        loss = lm_loss(model, batch)
        assert len(most) == len(names) and max(most) == 7  # the matrices of a layer
        assert not alive
        loss.backward()
    assert len(most) > len(names) and max(most[len(names) :]) <= 2
    assert not alive


def test_weights_may_be_read_from_a_file(tmp_path):
    model, batch = tiny_model(), tiny_batches(1)[0]
    names, parts = rest_of(model, find_blocks(model)[1])
    expected = lm_loss(model, batch).item()
    save_file(parts, tmp_path / "rest.safetensors")
    empty_parameters(model, names)
    with safe_open(tmp_path / "rest.safetensors", "pt") as file:
        on_disk = {part: file.get_slice(part) for part in file.keys()}  # noqa: SIM118
        with offloaded(
            model, names, lambda name: decode({p: on_disk[p][:] for p in parts if p.split(":")[0] == name})[name]
        ):
            assert lm_loss(model, batch).item() == expected
    assert torch.isnan(lm_loss(model, batch))


def test_an_error_inside_brings_the_weights_back():
    model, batch = tiny_model(), tiny_batches(1)[0]
    names, _ = rest_of(model, find_blocks(model)[1])
    expected = lm_loss(model, batch).item()
    with pytest.raises(KeyError), offloaded(model, names, coded_loader({})):
        lm_loss(model, batch)
    assert lm_loss(model, batch).item() == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_was_never_whole_trains_to_the_same_bits(name):
    model, batches = tiny_model(name), tiny_batches(1)
    block = find_blocks(model)[2]
    names, parts = rest_of(model, block)
    plain = train_block(model, block, lm_loss, batches, 2, 1e-2)

    light = empty_model(lambda: tiny_model(name))
    exact = dict(model.named_parameters())
    for key, parameter in light.named_parameters():
        assert parameter.untyped_storage().nbytes() == 4
        if key not in names and key not in block.parameters:
            parameter.data = exact[key].data
    with offloaded(light, names, coded_loader(parts)):
        held = train_block(light, block, lm_loss, batches, 2, 1e-2, start=exact)
    assert held.losses == plain.losses
    assert all(torch.equal(held.delta[key], plain.delta[key]) for key in plain.delta)
