import pytest
import torch
from torch import nn

from fedtune_strategies.blocks.find import block_sizes, decoder_layers, find_blocks
from fedtune_strategies.errors import ConfigError, ModelError
from tests.models import CONFIGS, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"layers_per_block": 2}, {"train_embeddings": False}],
)
def test_every_parameter_is_in_exactly_one_block(name, options):
    model = tiny_model(name)
    blocks = find_blocks(model, **options)
    members = [parameter for block in blocks for parameter in block.parameters]
    assert sorted(members) == sorted(dict(model.named_parameters()))
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert all(block.frozen == (block.kind != "layer") for block in blocks) or options.get("train_embeddings", True)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_become_blocks_in_order(name):
    blocks = [block for block in find_blocks(tiny_model(name), train_embeddings=False) if block.kind == "layer"]
    assert [block.layer for block in blocks] == [0, 1, 2]
    assert len({len(block.parameters) for block in blocks}) == 1


def test_kinds_follow_from_the_structure():
    untied = find_blocks(tiny_model("gpt-neox"))
    assert [block.kind for block in untied] == ["embedding", "layer", "layer", "layer", "head"]
    tied = find_blocks(tiny_model("gpt2"))
    assert [block.kind for block in tied] == ["embedding", "layer", "layer", "layer"]
    assert tied[0].parameters == ("transformer.wte.weight", "transformer.wpe.weight")


def test_last_group_of_layers_may_be_short():
    blocks = find_blocks(tiny_model(), layers_per_block=2)
    assert [block.name for block in blocks] == ["embedding", "layers 0-1", "layer 2 and norm", "head"]


def test_the_final_norm_goes_with_the_last_layer():
    joined = find_blocks(tiny_model("gpt2"))[-1]
    *_, layer, norm = find_blocks(tiny_model("gpt2"), train_embeddings=False)
    assert (joined.name, joined.with_norm) == ("layer 2 and norm", True)
    assert joined.parameters == layer.parameters + norm.parameters


def test_a_final_norm_that_is_frozen_or_not_of_vectors_alone_has_a_block_of_its_own():
    frozen = find_blocks(tiny_model(), train_embeddings=False)
    assert [(block.name, block.frozen) for block in frozen][-2:] == [("norm", True), ("head", True)]
    projected = find_blocks(tiny_model("opt"))
    assert projected[-1].name == "norm" and not projected[-1].with_norm


def test_layers_are_found_whatever_their_name_and_never_inside_one_another():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(50)])

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.little = nn.ModuleList([nn.Linear(2, 2)])
            self.cellar = nn.ModuleList([Experts(), Experts()])

    assert decoder_layers(Odd())[0] == "cellar"


def test_only_selects_adapters():
    model = tiny_model()
    blocks = find_blocks(model, only=lambda name: "q_proj" in name)
    assert [(block.name, len(block.parameters)) for block in blocks] == [("layer 0", 1), ("layer 1", 1), ("layer 2", 1)]


def test_the_blocks_sizes_make_up_the_model():
    model = tiny_model()
    assert sum(size for _, size in block_sizes(model, find_blocks(model))) == model.num_parameters()


def test_bad_options_and_models_give_clear_errors():
    with pytest.raises(ConfigError, match="1 or more"):
        find_blocks(tiny_model(), layers_per_block=0)
    with pytest.raises(ModelError, match="no list of decoder layers"):
        find_blocks(torch.nn.Linear(2, 2))


def test_what_no_gradient_reaches_is_in_no_block():
    model = tiny_model()
    model.model.layers[1].mlp.bias = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    model.model.layers[1].mlp.codes = torch.nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn), requires_grad=True)
    names = {name for block in find_blocks(model) for name in block.parameters}
    assert names == {name for name, _ in tiny_model().named_parameters()}
