"""The published tables of docs/seed-space.md, and the normals against Box-Muller in float64."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune_strategies.seed_space import cpu, make_pool, reference
from fedtune_strategies.seed_space.philox import NORMALS, philox, stream

PAGE = (Path(__file__).parents[2] / "docs" / "seed-space.md").read_text()
SIGNS = re.findall(r"\| (0x\w+) \| (\d+) \| (\d+) \| `([\w.]+)` \| (\d+) \| (\d+) \| `([+-]{32})` \|", PAGE)
NORMAL = re.findall(r"\| (0x\w+) \| `([\w.]+)` \| (\d+) \| (\d+) \| `((?:\w{8} ?){4})` \|", PAGE)


def test_the_tables_are_there():
    assert len(SIGNS) == len(NORMAL) == 5


@pytest.mark.parametrize("row", SIGNS, ids=lambda row: f"{row[3]}-{row[4]}")
def test_signs_are_the_published_ones(row):
    key, size, block, name, k, e, signs = row
    pool = make_pool("walsh", int(key, 16), int(size), int(block))
    z = pool.direction(name, (int(e) + 32,), int(k))[int(e) :]
    assert "".join("-" if sign < 0 else "+" for sign in z.tolist()) == signs


@pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("row", NORMAL, ids=lambda row: f"{row[1]}-{row[2]}")
def test_normals_are_the_published_ones(row, kernels):
    key, name, k, e, bits = row
    z = torch.empty(4)
    kernels.gaussian_rebuild(z, torch.zeros(4), torch.tensor([int(k)]), torch.ones(1), int(key, 16), name, int(e))
    assert z.numpy().view(np.uint32).tolist() == [int(word, 16) for word in bits.split()]


def test_normals_are_within_four_units_in_the_last_place_of_box_muller():
    words, count = stream("w", NORMALS), 1 << 16
    radius_bits, angle_bits = philox((torch.arange(count // 4), 5, *words), 7, "cpu").numpy().reshape(-1, 2).T
    u = ((radius_bits >> 9) * 2 + 1) / 2**24
    turn = (angle_bits >> 30) + (((angle_bits << 2 & 0xFFFFFFFF) >> 9) * 2 + 1) / 2**24 - 0.5
    radius = np.sqrt(-2 * np.log(u))
    exact = np.stack((radius * np.cos(turn * np.pi / 2), radius * np.sin(turn * np.pi / 2)), axis=1).ravel()
    found = reference.normals(7, words, 5, 0, count, "cpu").numpy()
    assert (np.abs(found - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()
