import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load, save
from torch._subclasses.fake_tensor import FakeTensorMode

from fedtune_strategies.blocks import codecs, train
from fedtune_strategies.blocks.codec_config import Codec, parse_codec
from fedtune_strategies.blocks.codecs import (
    NF4_VALUES,
    decode,
    encode,
    encoded_size,
)
from fedtune_strategies.blocks.train import apply_delta
from fedtune_strategies.errors import ConfigError, ModelError, ProtocolError
from tests.conftest import quick

CODECS = ["none", "bf16", "int8", "nf4", "prune:0.5", "prune:0.3+bf16", "prune:0.5+int8", "prune:0.9+nf4"]

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=20),
    elements=st.floats(-1e6, 1e6, width=32),
).map(torch.from_numpy)


def decoded(tensor, codec):
    return decode(encode({"w": tensor}, parse_codec(codec)))["w"]


@quick
@given(matrices)
def test_none_is_exact(tensor):
    assert torch.equal(decoded(tensor, "none"), tensor)


@quick
@given(matrices)
def test_bf16_rounds_to_nearest(tensor):
    assert torch.equal(decoded(tensor, "bf16"), tensor.bfloat16().float())


@quick
@given(matrices)
def test_int8_errs_by_half_a_step_of_its_row(tensor):
    step = tensor.flatten(1).abs().amax(dim=1).double() / 127
    error = (decoded(tensor, "int8").double() - tensor.double()).flatten(1).abs().amax(dim=1)
    assert (error <= step * 0.50001 + 1e-37).all()


def test_int8_and_commits_are_the_same_bits_in_pieces_of_any_size(monkeypatch):
    weight, change = torch.randn(2, 33, 7).bfloat16(), torch.randn(2, 33, 7).bfloat16()
    found = []
    for piece in (1, 20, 2**20):
        monkeypatch.setattr(codecs, "PIECE", piece)
        monkeypatch.setattr(train, "PIECE", piece)
        found.append(
            [*encode({"w": weight}, Codec("int8")).values(), *apply_delta({"w": weight}, {"w": change}, 0.3).values()]
        )
    scale = weight.float().abs().amax(dim=-1) / 127
    codes = (weight / scale.unsqueeze(-1)).round().to(torch.int8)
    for codes_, scale_, moved in found:
        assert torch.equal(codes_, codes) and torch.equal(scale_, scale)
        assert torch.equal(moved, change.float() * 0.3 + weight.float())


@quick
@given(matrices)
def test_nf4_picks_the_nearest_value(tensor):
    flat = tensor.flatten().double()
    got = decoded(tensor, "nf4").flatten().double()
    for begin in range(0, flat.numel(), 64):
        block, scale = flat[begin : begin + 64], flat[begin : begin + 64].abs().max()
        nearest = (block[:, None] - torch.tensor(NF4_VALUES).double() * scale).abs().amin(dim=1)
        assert ((got[begin : begin + 64] - block).abs() <= nearest + 1e-6 * scale + 1e-37).all()


@pytest.mark.parametrize("codec", CODECS)
@quick
@given(tensor=matrices)
def test_parts_survive_safetensors_and_are_deterministic(codec, tensor):
    tensors = {"a.weight": tensor, "a.bias": tensor.flatten().clone()}
    parts = encode(tensors, parse_codec(codec))
    again = load(save(parts))
    assert all(torch.equal(again[name], part) for name, part in parts.items())
    assert save(encode(tensors, parse_codec(codec))) == save(parts)
    result = decode(again)
    assert {name: value.shape for name, value in result.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(value.dtype == torch.float32 for value in result.values())
    assert torch.equal(result["a.bias"], tensors["a.bias"])


@quick
@given(matrices, st.floats(0.05, 0.95))
def test_pruning_keeps_the_largest_of_each_row_and_only_those(tensor, share):
    got = decoded(tensor, f"prune:{share}").flatten(0, -2)
    rows = tensor.flatten(0, -2)
    assert ((got == rows) | (got == 0)).all()
    lost = torch.where(got == 0, rows.abs(), 0.0).amax(dim=1)
    kept = torch.where(got != 0, rows.abs(), torch.inf).amin(dim=1)
    assert (lost < kept).all()
    assert ((got != rows).sum(dim=1) <= share * rows.shape[1]).all()


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        ("none", 32),
        ("bf16", 16),
        ("int8", 8),
        ("nf4", 4.5),
        ("prune:0.5", 17),
        ("prune:0.5+int8", 5),
        ("prune:0.5+nf4", 3.5),
    ],
)
def test_encoded_size(codec, bits):
    tensor = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    size = encoded_size(encode({"w": tensor}, parse_codec(codec)))
    assert size == pytest.approx(tensor.numel() * bits / 8, rel=0.01)


def test_nf4_values_are_those_of_the_paper():
    """QLoRA's recipe (arXiv 2305.14314, section 3): quantiles of a normal, eight above zero and seven below."""
    offset = 0.5 * (1 - 1 / 30 + 1 - 1 / 32)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([below, torch.zeros(1), above.flip(0)])
    torch.testing.assert_close(torch.tensor(NF4_VALUES).double(), values / values.abs().max(), atol=2e-7, rtol=0)


def test_known_codes():
    int8 = encode({"w": torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0]])}, Codec("int8"))
    assert int8["w:int8"].tolist() == [[127, -64, 0], [0, 0, 0]]
    nf4 = encode({"w": torch.tensor([[2.0, -2.0, 0.0]])}, Codec("nf4"))
    assert nf4["w:nf4"].tolist() == [15 | 0 << 4, 7]
    assert nf4["w:scale"].tolist() == [2.0]


def test_16_bit_tensors_go_as_they_are():
    tensor = torch.randn(4, 4).bfloat16()
    assert encode({"w": tensor}, Codec())["w"].dtype == torch.bfloat16
    assert torch.equal(decoded(tensor, "none"), tensor.float())


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match=r"tensor w holds a value that is not finite"):
        encode({"w": torch.tensor([[1.0, float("nan")]])}, Codec("int8"))


def test_broken_parts_are_refused():
    parts = encode({"w": torch.randn(4, 70)}, Codec("nf4", prune=0.5))
    for broken in ({k: v for k, v in parts.items() if k != "w:scale"}, {**parts, "w:nf4": parts["w:nf4"][:3]}):
        with pytest.raises(ProtocolError, match="tensor w"):
            decode(broken)
    with pytest.raises(ProtocolError):
        decode({"w:odd": torch.zeros(1)})


def test_parse_codec():
    assert parse_codec("none") == Codec()
    assert parse_codec("drop:2 + prune:0.5+nf4") == Codec("nf4", 0.5, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int4",
        "int8+nf4",
        "prune",
        "prune:1",
        "prune:x",
        "drop:0",
        "drop:1.5",
        "int8:3",
        "prune:0.5+prune:0.3",
        "wanda:0.5",
    ],
)
def test_bad_codecs_give_clear_errors(text):
    with pytest.raises(ConfigError, match="codec"):
        parse_codec(text)


def test_every_row_of_every_expert_has_a_scale_and_a_share_of_its_own():
    experts = torch.randn(3, 5, 32) * torch.logspace(-4, 0, 15).reshape(3, 5, 1)
    decoded = decode(encode({"w": experts}, parse_codec("int8")))["w"]
    assert ((decoded - experts).abs().amax(-1) <= experts.abs().amax(-1) / 127).all()
    pruned = decode(encode({"w": experts}, parse_codec("prune:0.5")))["w"]
    assert ((pruned != 0).sum(-1) == 16).all()


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "nf4"])
def test_parts_on_another_device_decode_there(codec):
    parts = encode({"w": torch.randn(4, 128)}, parse_codec(codec))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        elsewhere = {name: mode.from_tensor(part).to("meta") for name, part in parts.items() if name != "w:shape"}
        decoded = decode(elsewhere | {name: part for name, part in parts.items() if name == "w:shape"})
        assert decoded["w"].device.type == "meta"
