"""Philox against Random123's published known answers (kat_vectors, philox4x32 10)."""

import pytest
import torch

from fedtune_strategies.seed_space.philox import philox, signs, signs_at, stream


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    assert tuple(philox(counter, key, "cpu")[0].tolist()) == answer


def test_signs_do_not_depend_on_the_range_asked_for():
    words = stream("layer.weight", 1)
    whole = signs(7, words, 0, 1000, "cpu")
    assert set(whole.tolist()) == {-1.0, 1.0}
    assert torch.equal(whole[137:840], signs(7, words, 137, 703, "cpu"))
    assert torch.equal(whole, signs_at(7, words, torch.arange(1000)))


def test_streams_differ_by_name_and_domain():
    assert len({stream(name, domain) for name in ("a", "b") for domain in (1, 2, 3)}) == 6
