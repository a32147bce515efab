import pytest
import torch
from torch import nn

from fedtune_strategies.blocks import chunked_matmul
from fedtune_strategies.blocks.codec_config import parse_codec
from fedtune_strategies.blocks.codecs import decode, decode_rows, encode
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.frozen import FrozenBlocks
from fedtune_strategies.blocks.train import train_block
from tests.models import lm_loss, tiny_batches, tiny_model


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "nf4", "prune:0.5+int8"])
@pytest.mark.parametrize("columns", [64, 48])
def test_rows_are_those_of_the_whole(codec, columns):
    parts = encode({"w": torch.randn(10, columns)}, parse_codec(codec))
    whole = decode(parts)["w"]
    for rows in (slice(2, 7), torch.tensor([3, 0, 3])):
        assert torch.equal(decode_rows(parts, "w", rows), whole[rows])


def test_the_product_chunked_is_the_product(monkeypatch):
    monkeypatch.setattr(chunked_matmul, "LARGE", 1)
    monkeypatch.setattr(chunked_matmul, "_CHUNK", 30)
    module = nn.Linear(8, 10).requires_grad_(False)
    inputs = torch.randn(2, 3, 8, requires_grad=True)
    expected = module(inputs)
    (wanted,) = torch.autograd.grad(expected.square().sum(), inputs)
    found = chunked_matmul.large_modules(module, ["weight"])
    with chunked_matmul.chunked(found, lambda name, rows: module.weight[rows]):
        output = module(inputs)
        (got,) = torch.autograd.grad(output.square().sum(), inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_every_way_of_holding_a_large_matrix_gives_the_same_bits(monkeypatch, tied, autocast):
    monkeypatch.setattr(chunked_matmul, "LARGE", 500)
    monkeypatch.setattr(chunked_matmul, "_CHUNK", 300)
    updates = []
    for hold in ("decoded", "coded", "disk"):
        model = tiny_model(tie_word_embeddings=tied)
        blocks = find_blocks(model)
        block = next(block for block in blocks if block.kind == "layer")
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        rest = FrozenBlocks(model, [name for own in blocks for name in own.parameters], hold)
        rest.put(encode(weights, parse_codec("int8")))
        assert len(chunked_matmul.large_modules(model, weights)) >= 2
        start = {name: weights[name] for name in block.parameters}
        with rest.in_use(block.parameters):
            updates.append(train_block(model, block, lm_loss, tiny_batches(2), 2, 1e-2, start=start, autocast=autocast))
    for other in updates[1:]:
        assert other.losses == updates[0].losses
        assert all(torch.equal(value, other.delta[name]) for name, value in updates[0].delta.items())


def test_chunks_of_a_16_bit_gradient_are_summed_in_float32(monkeypatch):
    torch.manual_seed(0)
    module = nn.Linear(8, 4096, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    inputs = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(2, 4096, dtype=torch.bfloat16)
    exact = upstream.double() @ module.weight.double()
    monkeypatch.setattr(chunked_matmul, "_CHUNK", 8 * 16)
    with chunked_matmul.chunked({module: "weight"}, lambda name, rows: module.weight[rows]):
        (got,) = torch.autograd.grad(module(inputs), inputs, upstream)
    assert ((got.double() - exact).norm() / exact.norm()) < 2**-8  # one rounding to bfloat16, and less
