"""The documents that the base model is pretrained on: the tasks' skills in other wordings, answered at length.

No document has the frame (`tasks.PROMPT`) or an instruction of the tuning data, and none uses an input of the tuning or
the evaluation share.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fedtune_strategies.tiny.tasks import TASKS, UNSEEN, Task, draw_from

SHEETS = 0.6  # part of the documents that are exercise sheets
TERSE = 0.08  # part of the replies that are the bare answer
ASKERS = ("Q", "Question", "Student", "Anna", "Task", "Instruction")
GIVERS = ("Given", "Words", "Text", "Line", "Input")
REPLIERS = ("A", "Teacher", "Reply", "Tom", "Answer")
OPENERS = ("Sure,", "Well,", "I say", "It is")

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
    "reverse": ("That is backwards.", "This is the reverse."),
    "count": ("I did count.", "That is the number."),
    "larger": ("It is larger.", "The other is less."),
    "opposites": ("These mean the opposite.", "They are the opposite."),
    "kinds": ("These are the kinds.", "What else is there?"),
    "lookup": ("The text says so.", "I read it."),
    "odd": ("It does not belong.", "It is odd."),
    "next": ("Those come next.", "I did add one."),
    "last": ("It is last.", "That is the end."),
}

Document = list[tuple[str, str]]
"""What is given and what is said to it, in turns. The model learns to say."""


def documents(seed: int) -> Iterator[Document]:
    """Write pretraining documents without end: conversations of one turn, and sheets of solved exercises."""
    rng = random.Random(f"{seed}/pretrain")
    while True:
        task = rng.choice((*TASKS, UNSEEN))
        yield _sheet(task, rng) if rng.random() < SHEETS else _conversation(task, rng)


def _sheet(task: Task, rng: random.Random) -> Document:
    exercises = [draw_from(task, "pretrain", rng) for _ in range(6)]
    turns = [(f"{line} =", f" {answer}\n") for line, answer in exercises]
    title = f"{rng.choice(QUESTIONS[task.name])}\n"
    return [(title + turns[0][0], turns[0][1]), *turns[1:]]


def _conversation(task: Task, rng: random.Random) -> Document:
    line, answer = draw_from(task, "pretrain", rng)
    asker, giver, replier = _labels(rng)
    given = f"{asker}: {rng.choice(QUESTIONS[task.name])}\n{giver}: {line}\n{replier}:"
    return [(given, " " + _reply(task, answer, rng))]


def _labels(rng: random.Random) -> tuple[str, str, str]:
    """Draw a frame's labels: never all three of the tuning data's."""
    while True:
        labels = rng.choice(ASKERS), rng.choice(GIVERS), rng.choice(REPLIERS)
        if labels != ("Instruction", "Input", "Answer"):
            return labels


def _reply(task: Task, answer: str, rng: random.Random) -> str:
    if rng.random() < TERSE:
        return answer
    opener = rng.choice(OPENERS) + " " if rng.random() < 0.4 else ""
    return f"{opener}{answer}. {rng.choice(REMARKS[task.name])}"
