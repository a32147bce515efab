"""The published table of signs in docs/seed-space.md."""

import re
from pathlib import Path

import pytest

from fedtune_strategies.seed_space import make_pool

PAGE = Path(__file__).parents[2] / "docs" / "seed-space.md"
ROW = re.compile(r"\| (0x\w+) \| (\d+) \| (\d+) \| `([\w.]+)` \| (\d+) \| (\d+) \| `([+-]{32})` \|")
ROWS = ROW.findall(PAGE.read_text())


def test_the_table_is_there():
    assert len(ROWS) == 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[3]}-{row[4]}")
def test_signs_are_the_published_ones(row):
    key, size, block, name, k, e, signs = row
    pool = make_pool("walsh", int(key, 16), int(size), int(block))
    z = pool.direction(name, (int(e) + 32,), int(k))[int(e) :]
    assert "".join("-" if sign < 0 else "+" for sign in z.tolist()) == signs
