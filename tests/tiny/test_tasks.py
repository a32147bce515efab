import json
import re
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining.corpus import documents

from fedtune_strategies.errors import DataError
from fedtune_strategies.tiny.tasks import TASKS, UNSEEN, rows, share_of, tasks_of_node, write_federation
from fedtune_strategies.tiny.words import COUNTS, KINDS, OPPOSITES

FRAME = re.compile(r"Instruction: (?P<instruction>[^\n]+)\nInput: (?P<line>[^\n]+)\nAnswer:")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def line_of(row: dict[str, str]) -> str:
    match = FRAME.fullmatch(row["prompt"])
    assert match, row
    return match["line"]


def kind_of(noun: str) -> str:
    (kind,) = [kind for kind, nouns in KINDS.items() if noun in nouns]
    return kind


def opposite_of(word: str) -> str:
    (pair,) = [set(pair) for pair in OPPOSITES if word in pair]
    (opposite,) = pair - {word}
    return opposite


def odd_of(words: list[str]) -> str:
    often = Counter(map(kind_of, words))
    (odd,) = [word for word in words if often[kind_of(word)] == 1]
    return odd


def owned(text: str) -> str:
    asked = re.search(r"What does (\w+) have\?", text)
    assert asked
    return re.findall(rf"{asked[1]} has ([a-z ]+)", text)[0]


# Written apart from the generator: from the line of a prompt to its answer.
SOLVE = {
    "reverse": lambda line: " ".join(line.split()[::-1]),
    "count": lambda line: COUNTS[line.count(" ")],
    "larger": lambda line: max(line.split(), key=int),
    "opposites": lambda line: " ".join(map(opposite_of, line.split())),
    "kinds": lambda line: " ".join(map(kind_of, line.split())),
    "lookup": owned,
    "odd": lambda line: odd_of(line.split()),
    "next": lambda line: " ".join(str(int(number) + 1) for number in line.split()),
    "last": lambda line: line.split()[-1],
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[dict[str, str]]], list[dict[str, str]]]:
    nodes, heldout = write_federation(tmp_path_factory.mktemp("federation"))
    return [read(path) for path in nodes], read(heldout)


def test_answers_are_right(federation):
    nodes, heldout = federation
    for row in [*chain(*nodes), *heldout]:
        assert row["completion"] == " " + SOLVE[row["task"]](line_of(row)), row


def test_nodes_have_tasks_of_their_own_and_the_unseen_task_is_nowhere(federation):
    nodes, heldout = federation
    of_node = [{row["task"] for row in rows_} for rows_ in nodes]
    assert len(nodes) == 4
    assert sum(map(len, of_node)) == len(set.union(*of_node)) == len(TASKS)
    assert UNSEEN.name not in set.union(*of_node)
    assert {row["task"] for row in heldout} == {UNSEEN.name, *set.union(*of_node)}
    assert not any(UNSEEN.instruction in row["prompt"] for row in chain(*nodes))


def test_heldout_is_disjoint_from_training_and_no_row_comes_twice(federation):
    nodes, heldout = federation
    prompts = [row["prompt"] for row in chain(*nodes)]
    assert len(set(prompts)) == len(prompts)
    assert not set(map(line_of, heldout)) & {line_of(row) for row in chain(*nodes)}
    assert Counter(row["task"] for row in heldout) == {task.name: 24 for task in (*TASKS, UNSEEN)}


def test_same_seed_same_bytes(tmp_path: Path):
    first, second, other = (
        [path.read_bytes() for path in sorted(write_federation(tmp_path / name, seed=seed)[1].parent.iterdir())]
        for name, seed in [("first", 7), ("second", 7), ("other", 8)]
    )
    assert first == second
    assert not set(first) & set(other)


@settings(max_examples=10, deadline=None)
@given(nodes=st.integers(1, 2 * len(TASKS) + 3))
def test_any_number_of_nodes_covers_all_tasks_without_sharing_a_row(nodes: int, tmp_path_factory):
    paths, _ = write_federation(tmp_path_factory.mktemp("n"), nodes, train_per_task=4, heldout_per_task=1)
    files = [read(path) for path in paths]
    prompts = [row["prompt"] for row in chain(*files)]
    assert len(paths) == nodes
    assert len(set(prompts)) == len(prompts)
    for node, rows_ in enumerate(files):
        assert Counter(row["task"] for row in rows_) == {task.name: 4 for task in tasks_of_node(node, nodes)}
    if nodes >= len(TASKS):
        assert {row["task"] for rows_ in files for row in rows_} == {task.name for task in TASKS}


def test_too_many_rows_are_refused():
    (opposites,) = [task for task in TASKS if task.name == "opposites"]
    with pytest.raises(DataError, match=r"task opposites has no 2000 distinct inputs.*fewer"):
        rows(opposites, "tune", 2000, seed=0)


def test_pretraining_has_no_frame_no_instruction_and_no_reserved_input(federation):
    nodes, heldout = federation
    reserved = {line_of(row) for row in [*chain(*nodes), *heldout]}
    corpus = list(islice(documents(seed=0), 3000))
    assert list(islice(documents(seed=0), 3000)) == corpus
    for document in corpus:
        text = "".join(question + reply for question, reply in document)
        assert not any(task.instruction in text for task in (*TASKS, UNSEEN))
        assert not re.search(r"Instruction:.*Input:.*Answer:", text, re.DOTALL)
        for question, _ in document:
            asked = re.search(r"(?:^|\n)(?:\w+: )?([^\n]+)(?: =|\n\w+:)$", question)
            assert asked
            assert asked[1] not in reserved
            assert share_of(asked[1]) == "pretrain"


def test_inputs_are_divided_once_and_for_all():
    assert [share_of(line) for line in ("cat dog rose", "hot small", "35 48")] == ["pretrain", "tune", "evaluate"]
