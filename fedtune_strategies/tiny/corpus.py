"""The documents that the base model is pretrained on: the tasks' skills in other wordings, answered at length.

No document has the frame (`tasks.PROMPT`) or an instruction of the tuning data, and no document uses an input of the tuning or evaluation share.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fedtune_strategies.tiny.tasks import TASKS, UNSEEN, draw_from
from fedtune_strategies.tiny.words import COUNTS, KINDS, NAMES, OPPOSITES

ASKERS = ("Q", "Question", "Student", "Anna", "Task", "Instruction")
GIVERS = ("Given", "Words", "Text", "Line", "Input")
REPLIERS = ("A", "Teacher", "Reply", "Tom", "Answer")
OPENERS = ("Well, let me see.", "Sure.", "Of course.", "Good question.", "I think I know.", "Yes.", "With pleasure.")
CLOSERS = ("", "", "", " That is all.", " Ask me again.")
BRIEF = ("It is {answer}.", "I say {answer}.", "So {answer}.")

# For each task: how a question is worded, and how the long answer puts it.
QUESTIONS = {
    "reverse": (
        *("How do these words read backwards?", "Please turn the words around, in reverse.", "Can you reverse this?"),
        *("Say this in the reverse order.", "What are the words in order from the end to the start?"),
    ),
    "sort": (
        *("Can you sort this?", "Please put the numbers in order, the smallest at the start.", "Sort these for me."),
        *("What are the numbers from the smallest to the largest?", "Which number is first when you sort these?"),
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
STATEMENTS = {
    "reverse": ("Backwards the words are {answer}.", "In reverse, this reads {answer}."),
    "sort": ("In order the numbers are {answer}.", "From the smallest to the largest we have {answer}."),
    "count": ("I count {answer} words.", "The number of words is {answer}."),
    "larger": ("The larger number is {answer}.", "Of the two, the larger one is {answer}."),
    "opposites": ("The opposite words are {answer}.", "The words that mean the opposite are {answer}."),
    "kinds": ("The kinds of these are {answer}.", "In order, they are {answer}."),
    "lookup": ("The text says it is {answer}.", "What you ask for is {answer}."),
    "odd": ("The odd word is {answer}.", "The one that does not belong is {answer}."),
    "next": ("The next numbers are {answer}.", "After these come {answer}."),
    "last": ("The last word is {answer}.", "At the end there is {answer}."),
}


def documents(count: int, seed: int, terse: float = 0.08) -> Iterator[str]:
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
    str
        A document of a few lines.
    """
    rng = random.Random(f"{seed}/pretrain")
    for _ in range(count):
        yield _fact(rng) if rng.random() < 0.08 else _conversation(rng, terse)


def _conversation(rng: random.Random, terse: float) -> str:
    task = rng.choice((*TASKS, UNSEEN))
    line, answer = draw_from(task, "pretrain", rng)
    asker, giver, replier = _labels(rng)
    question = rng.choice(QUESTIONS[task.name])
    given = f"\n{giver}: {line}" if rng.random() < 0.7 else f" {line}"
    return f"{asker}: {question}{given}\n{replier}: {_reply(task.name, answer, rng, terse)}"


def _labels(rng: random.Random) -> tuple[str, str, str]:
    """Draw a frame's labels: never all three of the tuning data's."""
    while True:
        labels = rng.choice(ASKERS), rng.choice(GIVERS), rng.choice(REPLIERS)
        if labels != ("Instruction", "Input", "Answer"):
            return labels


def _reply(task: str, answer: str, rng: random.Random, terse: float) -> str:
    draw = rng.random()
    if draw < terse:
        return answer
    if draw < 2 * terse:
        return rng.choice(BRIEF).format(answer=answer)
    return f"{rng.choice(OPENERS)} {rng.choice(STATEMENTS[task]).format(answer=answer)}{rng.choice(CLOSERS)}"


def _fact(rng: random.Random) -> str:
    """State what the questions ask for."""
    kind = rng.choice(list(KINDS))
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    number = rng.randrange(1, 99)
    return rng.choice(
        (
            f"The {rng.choice(KINDS[kind])} is a kind of {kind}. So is the {rng.choice(KINDS[kind])}.",
            f"The opposite of {pair[0]} is {pair[1]}.",
            f"After {number} comes {number + 1}. The larger number is {number + 1}.",
            f"We count {' '.join(COUNTS)}.",
            f"{rng.choice(NAMES)} has a {rng.choice(KINDS['colour'])} {rng.choice(KINDS['garment'])}.",
        )
    )
