"""docs/architectures.md is what every causal language model of transformers gives, tiny, on every path."""

import re
import warnings
from pathlib import Path

import pytest
import transformers

from benchmarks import architectures

PAGE = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text()
GROUPS = 16
KINDS = architectures.kinds()


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


def recorded(kind):
    """Results of a kind as the page has them, with its notes in place."""
    if kind in re.search(r"^Right on every path: (.*?)\.$", PAGE, re.M | re.S)[1].replace(",", "").split():
        return ["ok"] * len(architectures.PATHS)
    (row,) = re.findall(rf"^\| {re.escape(kind)} \| (.*) \|$", PAGE, re.MULTILINE)
    notes = dict(re.findall(r"^(\(\d+\)) (.*)$", PAGE, re.MULTILINE))
    return [notes.get(cell, cell) for cell in row.split(" | ")]


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_architecture_gives_what_is_recorded(group):
    kinds = KINDS[group::GROUPS]
    assert {kind: architectures.results(kind) for kind in kinds} == {kind: recorded(kind) for kind in kinds}


def test_no_architecture_is_wrong_without_being_refused():
    assert "wrong" not in {cell for kind in KINDS for cell in recorded(kind)}


def test_most_architectures_are_right_on_every_path():
    assert sum(set(recorded(kind)) == {"ok"} for kind in KINDS) >= 150
