"""Instruction data written by rule: task families whose answers a program can check, split over nodes by task.

Every question is a *task* (a rule) applied to an *input* (a line of words or numbers). Inputs are divided once and for
all into three shares by a hash of the line: one to pretrain the base model on, one to tune it with, one to evaluate on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedtune_strategies.errors import DataError
from fedtune_strategies.tiny.words import COUNTS, KINDS, NAMES, NOUNS, NUMBERS, OPPOSITES

PROMPT = "Instruction: {instruction}\nInput: {input}\nAnswer:"
SHARES = {"evaluate": range(0, 1), "tune": range(1, 4), "pretrain": range(4, 10)}  # tenths of all inputs

Example = tuple[str, str]  # input, answer


class Task(NamedTuple):
    """One family of questions."""

    name: str  # label in the data files and in the evaluation by task
    instruction: str  # how the tuning data words the task; the base model has never seen this sentence
    draw: Callable[[random.Random], Example]  # draws one input and its answer


def _reverse(rng: random.Random) -> Example:
    words = rng.sample(NOUNS, 3)
    return " ".join(words), " ".join(reversed(words))


def _count(rng: random.Random) -> Example:
    words = rng.sample(NOUNS, rng.randint(1, len(COUNTS)))
    return " ".join(words), COUNTS[len(words) - 1]


def _larger(rng: random.Random) -> Example:
    numbers = rng.sample(NUMBERS, 2)
    return " ".join(map(str, numbers)), str(max(numbers))


def _opposites(rng: random.Random) -> Example:
    pairs = [rng.sample(pair, 2) for pair in rng.sample(OPPOSITES, 2)]
    return " ".join(word for word, _ in pairs), " ".join(opposite for _, opposite in pairs)


def _kinds(rng: random.Random) -> Example:
    kinds = [rng.choice(list(KINDS)) for _ in range(3)]
    return " ".join(rng.choice(KINDS[kind]) for kind in kinds), " ".join(kinds)


def _lookup(rng: random.Random) -> Example:
    owners = rng.sample(NAMES, 2)
    things = [f"a {rng.choice(KINDS['colour'])} {rng.choice(KINDS['garment'])}" for _ in owners]
    asked = rng.randrange(len(owners))
    facts = ", ".join(f"{owner} has {thing}" for owner, thing in zip(owners, things, strict=True))
    return f"{facts}. What does {owners[asked]} have?", things[asked]


def _odd(rng: random.Random) -> Example:
    kind, other = rng.sample(list(KINDS), 2)
    odd = rng.choice(KINDS[other])
    words = [*rng.sample(KINDS[kind], 2), odd]
    rng.shuffle(words)
    return " ".join(words), odd


def _next(rng: random.Random) -> Example:
    numbers = rng.sample(NUMBERS[:-1], 2)
    return " ".join(map(str, numbers)), " ".join(str(number + 1) for number in numbers)


def _last(rng: random.Random) -> Example:
    words = rng.sample(NOUNS, rng.randint(2, 4))
    return " ".join(words), words[-1]


TASKS = (
    Task("reverse", "Write the words in reverse order.", _reverse),
    Task("count", "Count the words.", _count),
    Task("larger", "Pick the larger number.", _larger),
    Task("opposites", "Give the opposite of each word.", _opposites),
    Task("kinds", "Name the kind of each word.", _kinds),
    Task("lookup", "Read and answer the question.", _lookup),
    Task("odd", "Find the word that is unlike the others.", _odd),
    Task("next", "Write the next number after each.", _next),
)
UNSEEN = Task("last", "Write the last word.", _last)  # evaluated, on no node


def share_of(line: str) -> str:
    """Name the share that an input belongs to: "pretrain", "tune" or "evaluate", the same on every machine."""
    tenth = hashlib.sha256(line.encode()).digest()[0] % 10
    return next(share for share, tenths in SHARES.items() if tenth in tenths)


def draw_from(task: Task, share: str, rng: random.Random) -> Example:
    """Draw an example whose input is in one share."""
    while True:
        example = task.draw(rng)
        if share_of(example[0]) == share:
            return example


def rows(task: Task, share: str, count: int, seed: int) -> list[dict[str, str]]:
    """Write distinct rows of one task in TRL's prompt/completion format, with the task's name."""
    rng = random.Random(f"{seed}/{task.name}/{share}")
    examples: dict[str, str] = {}
    for _ in range(20 * count):
        if len(examples) == count:
            break
        examples.update([draw_from(task, share, rng)])
    if len(examples) < count:
        raise DataError(f"task {task.name} has no {count} distinct inputs to {share} with: ask for fewer rows a task")
    return [
        {
            "prompt": PROMPT.format(instruction=task.instruction, input=line),
            "completion": f" {answer}",
            "task": task.name,
        }
        for line, answer in examples.items()
    ]


def tasks_of_node(node: int, nodes: int) -> tuple[Task, ...]:
    """Deal the tasks to nodes: each node has its own, and with more nodes than tasks they share by turns."""
    return TASKS[node::nodes] or (TASKS[node % len(TASKS)],)


def node_rows(node: int, nodes: int, train_per_task: int, seed: int) -> list[dict[str, str]]:
    """Write one node's training rows, shuffled; no row is on two nodes."""
    turn, turns = node // len(TASKS), -(-nodes // len(TASKS))
    dealt = [
        row
        for task in tasks_of_node(node, nodes)
        for row in rows(task, "tune", turns * train_per_task, seed)[turn::turns]
    ]
    random.Random(f"{seed}/node {node}").shuffle(dealt)
    return dealt


def write_federation(
    folder: str | Path, nodes: int = 4, train_per_task: int = 256, heldout_per_task: int = 24, seed: int = 0
) -> tuple[list[Path], Path]:
    """Write a federation's data: a training file for each node, and a held-out file of all tasks and the unseen one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    node_files = [folder / f"node_{node}.jsonl" for node in range(nodes)]
    for node, path in enumerate(node_files):
        _write_jsonl(path, node_rows(node, nodes, train_per_task, seed))
    heldout_file = folder / "heldout.jsonl"
    by_task = [rows(task, "evaluate", heldout_per_task, seed) for task in (*TASKS, UNSEEN)]
    _write_jsonl(
        heldout_file, [row for turn in zip(*by_task, strict=True) for row in turn]
    )  # any first rows: all tasks
    return node_files, heldout_file


def _write_jsonl(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
