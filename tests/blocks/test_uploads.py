import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune_strategies.blocks.codec_config import UPLOAD_WIDTHS, UPLOADS
from fedtune_strategies.blocks.codecs import SIGN_ROW, decode, encode, encoded_size
from fedtune_strategies.blocks.uploads import Residuals, encode_with_feedback, expected_layout, fits, layout_of
from fedtune_strategies.errors import ModelError, ProtocolError
from tests.conftest import quick

SHAPES = st.lists(st.lists(st.integers(1, 5) | st.just(SIGN_ROW), max_size=3), min_size=1, max_size=4)
numbers = st.floats(-1e6, 1e6, width=32)
narrow = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=numbers)
wide = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(SIGN_ROW, 80)), elements=numbers)
changes = (narrow | wide).map(torch.from_numpy)


def sent(change):
    return decode(encode({"w": change}, UPLOADS["sign"]))["w"]


@quick
@given(changes)
def test_a_sign_keeps_the_direction_of_every_value_and_the_mean_size_of_its_row(change):
    got = sent(change)
    assert got.shape == change.shape and ((got > 0) == (change >= 0))[got != 0].all()
    rows = change.double().abs()
    mean = rows.mean(-1, keepdim=True) if change.shape[-1] >= SIGN_ROW else rows.mean()
    torch.testing.assert_close(got.double().abs(), mean.expand(change.shape), rtol=1e-5, atol=1e-30)


@quick
@given(changes, st.floats(0.5, 2.0))
def test_no_other_scale_is_nearer_to_the_change(change, factor):
    got = sent(change).double()
    near, far = ((change.double() - one).square().sum() for one in (got, factor * got))
    assert near <= far * (1 + 1e-5) + 1e-9


def test_a_row_that_does_not_move_stays():
    embedding = torch.zeros(50, SIGN_ROW)
    embedding[7] = torch.randn(SIGN_ROW)
    assert sent(embedding).count_nonzero(dim=1).nonzero().flatten().tolist() == [7]


def test_a_value_takes_a_bit():
    change = {"w": torch.randn(256, 1024)}
    for upload, codec in UPLOADS.items():
        size = encoded_size(encode(change, codec))
        assert size == pytest.approx(change["w"].numel() * UPLOAD_WIDTHS[upload], rel=0.05)


@quick
@given(changes.filter(lambda change: change.numel() > 1), st.sampled_from(["int8", "sign"]), st.integers(2, 6))
def test_error_feedback_loses_nothing_over_time(change, upload, turns):
    residual, received = {}, torch.zeros_like(change)
    for _ in range(turns):
        parts, residual = encode_with_feedback({"w": change}, residual, UPLOADS[upload])
        received = received + decode(parts)["w"]
    largest = change.abs().max()
    assert ((received + residual["w"] - turns * change).abs() <= 1e-5 * largest * turns * turns).all()
    if upload == "int8":
        assert (residual["w"].abs() <= largest / 127 + 1e-30).all()


@given(changes)
def test_bf16_rounds_each_value_by_at_most_a_256th_and_keeps_nothing(change):
    parts, residual = encode_with_feedback({"w": change}, {}, UPLOADS["bf16"])
    # Below the smallest normal number the step is fixed.
    assert ((decode(parts)["w"] - change).abs() <= change.abs() / 256 + 1e-38).all() and residual == {}


@given(SHAPES, st.sampled_from(list(UPLOADS)))
def test_what_is_sent_fits(shapes, upload):
    tensors = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    parts, _ = encode_with_feedback(tensors, {}, UPLOADS[upload])
    assert layout_of(parts) == expected_layout(tensors, upload) and fits(parts, tensors, upload)


def test_signs_of_another_shape_do_not_fit():
    tensors = {"w": torch.randn(8, 16)}
    parts = encode(tensors, UPLOADS["sign"])
    assert fits(parts, tensors, "sign")
    for other in ([16, 8], [2**40, 2**40], [-8, -16]):
        assert not fits(parts | {"w:shape": torch.tensor(other)}, tensors, "sign")
    assert not fits({name: part for name, part in parts.items() if name != "w:shape"}, tensors, "sign")


def test_signs_that_claim_to_be_many_are_refused_before_there_is_room_for_them():
    parts = encode({"w": torch.randn(8, 16)}, UPLOADS["sign"])
    with pytest.raises(ProtocolError, match="tensor w"):
        decode(parts | {"w:shape": torch.tensor([2**20, 2**20])})


def test_a_change_that_is_not_finite_is_not_sent():
    with pytest.raises(ModelError, match="not finite"):
        encode({"w": torch.tensor([[1.0, float("nan")]])}, UPLOADS["sign"])


def test_residuals_are_kept_as_they_were_until_they_are_replaced(tmp_path):
    kept = Residuals(tmp_path / "kept")
    kept[3] = {"a": torch.ones(2), "b": torch.zeros(1, 2)}
    kept[3] = {"a": torch.full((2,), 5.0)}
    kept[4] = {}
    assert list(kept) == [3, 4] and kept[3]["a"].tolist() == [5.0, 5.0] and kept[3].keys() == {"a"}
    assert list(Residuals(tmp_path / "kept")) == [3, 4] and (tmp_path / "kept").stat().st_mode & 0o077 == 0
    kept.clear()
    assert not kept and kept.get(3, {}) == {}
