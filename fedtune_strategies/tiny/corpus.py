"""The documents that the base model is pretrained on: the tasks' skills in other wordings, answered at length.

No document has the frame (`tasks.PROMPT`) or an instruction of the tuning data, and none uses an input of the tuning or
the evaluation share.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from fedtune_strategies.tiny.tasks import TASKS, UNSEEN, draw_from
from fedtune_strategies.tiny.words import COUNTS, KINDS, OPPOSITES

ASKERS = ("Q", "Question", "Student", "Anna", "Task", "Instruction")
GIVERS = ("Given", "Words", "Text", "Line", "Input")
REPLIERS = ("A", "Teacher", "Reply", "Tom", "Answer")
OPENERS = ("Sure,", "Well,", "I say", "It is")
CLOSERS = ("Ask me again.", "I hope that helps.", "That is all I know.", "Good question.", "")

# For each task: how a question is worded, and what the long answer adds.
QUESTIONS = {
    "reverse": (
        *("How do these words read backwards?", "Please turn the words around, in reverse.", "Can you reverse this?"),
        *("Say this in the reverse order.", "What are the words in order from the end to the start?"),
    ),
    "count": (
        *("How many words are there?", "Can you count for me?", "What is the number of words?", "Count these, please."),
        *("How many do you count here?",),
    ),
    "larger": (
        *("Which number is larger?", "Please find the larger of the two.", "Can you pick the larger one?"),
        *("What is the larger number here?", "Pick the one that is larger."),
    ),
    "opposites": (
        *("What is the opposite of these?", "Please find the opposite words.", "Give me the opposite of both."),
        *("Which words mean the opposite?", "Say the opposite of all these."),
    ),
    "kinds": (
        *("What kind of thing are these?", "Please tell me the kind of all of these.", "Which kind is each one?"),
        *("Can you name the kinds?", "Name what kind of word this is, for each."),
    ),
    "lookup": (
        *("Please read this.", "Can you answer the question in this text?", "What is the answer to this question?"),
        *("Read the text for me.", "Here is a question to answer."),
    ),
    "odd": (
        *("Which word is unlike the rest?", "Can you find the one that is not like the others?", "Find the odd word."),
        *("Which one is unlike the others?", "Please find what does not belong."),
    ),
    "next": (
        *(
            "Which number comes next after these?",
            "What is the next number, for each?",
            "Please add one to each number.",
        ),
        *("Can you say what comes after each number?", "Write what is next."),
    ),
    "last": (
        *("Which word is at the end?", "What is the last of these words?", "Can you find the last one?"),
        *("Please tell me which word comes last.", "Say the last thing here."),
    ),
}
REMARKS = {
    "reverse": ("That is how the words read backwards.", "This is the reverse."),
    "count": ("I did count the words.", "That is the number of words."),
    "larger": ("It is the larger number.", "The larger of the two is that."),
    "opposites": ("These mean the opposite.", "They are the opposite words."),
    "kinds": ("These are the kinds.", "That is what kind of thing they are."),
    "lookup": ("The text says so.", "I read it in the text."),
    "odd": ("It does not belong with the others.", "That is the odd word."),
    "next": ("These are the next numbers.", "Those come after."),
    "last": ("It is the last word.", "That is at the end."),
}


class Document(NamedTuple):
    """A text to pretrain on.

    Attributes
    ----------
    question : str
        What is given; empty for a plain statement.
    reply : str
        What the model learns to say.
    """

    question: str
    reply: str


def documents(count: int, seed: int, terse: float = 0.08) -> Iterator[Document]:
    """Write pretraining documents.

    Parameters
    ----------
    count : int
        How many documents.
    seed : int
        Same seed, same documents.
    terse : float
        Part of the answers that are given without any words around them.

    Yields
    ------
    Document
        Most are a question of two lines and the reply to it.
    """
    rng = random.Random(f"{seed}/pretrain")
    for _ in range(count):
        yield Document("", _fact(rng)) if rng.random() < 0.04 else _conversation(rng, terse)


def _conversation(rng: random.Random, terse: float) -> Document:
    task = rng.choice((*TASKS, UNSEEN))
    line, answer = draw_from(task, "pretrain", rng)
    asker, giver, replier = _labels(rng)
    question = f"{asker}: {rng.choice(QUESTIONS[task.name])}\n{giver}: {line}\n{replier}:"
    return Document(question, " " + _reply(task.name, answer, rng, terse))


def _labels(rng: random.Random) -> tuple[str, str, str]:
    """Draw a frame's labels: never all three of the tuning data's."""
    while True:
        labels = rng.choice(ASKERS), rng.choice(GIVERS), rng.choice(REPLIERS)
        if labels != ("Instruction", "Input", "Answer"):
            return labels


def _reply(task: str, answer: str, rng: random.Random, terse: float) -> str:
    if rng.random() < terse:
        return answer
    opener = rng.choice(OPENERS) + " " if rng.random() < 0.4 else ""
    return f"{opener}{answer}. {rng.choice(REMARKS[task])} {rng.choice(CLOSERS)}".rstrip()


def _fact(rng: random.Random) -> str:
    """State what the questions ask for."""
    kind = rng.choice(list(KINDS))
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    number = rng.randrange(1, 60)
    return rng.choice(
        (
            f"The {rng.choice(KINDS[kind])} is a kind of {kind}. So is the {rng.choice(KINDS[kind])}.",
            f"The opposite of {pair[0]} is {pair[1]}.",
            f"After {number} comes {number + 1}. The larger number is {number + 1}.",
            f"We count {' '.join(COUNTS)}.",
        )
    )
