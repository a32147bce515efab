"""Held-out evaluation of the global model on the server, recorded in the ledger."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune_strategies.config import Config
from fedtune_strategies.language.data import Row, read_rows
from fedtune_strategies.language.evaluation import evaluate_generation, evaluate_loss
from fedtune_strategies.language.examples import Examples, Prompts, tokenise, tokenise_prompts
from fedtune_strategies.language.model import LanguageModel

log = logging.getLogger("fedtune")

_SHOWN_ANSWERS = 16
_AT_ONCE = 8  # answers between two looks at the clock
_SHARE = 0.25  # of a round's deadline that answering may take: a large model on a CPU would need longer than the round


@dataclass(frozen=True)
class HeldOut:
    """The operator's held-out examples, tokenised: each a spread over the file."""

    loss: Examples
    answers: Prompts | None  # for Rouge-L of greedy answers; None where ``eval.answers`` is 0, and for plain text


def load_held_out(config: Config, language: LanguageModel) -> HeldOut | None:
    """Read and tokenise ``eval.data``; None where it is empty."""
    if not config.eval.data:
        return None
    rows = read_rows(Path(config.eval.data), config.eval.format)

    loss = tokenise(_spread(rows, config.eval.max_examples), language.tokenizer, config.train.seq_length)
    asked = list(_spread(rows, config.eval.answers)) if rows[0].prompt is not None else []
    random.Random(0).shuffle(asked)  # any first part of them is a sample
    return HeldOut(loss, tokenise_prompts(asked, language.tokenizer) if asked else None)


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """Return the rows in the middle of `count` equal parts of the file, which may be sorted."""
    count = min(count, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def evaluate(
    language: LanguageModel,
    held_out: HeldOut,
    config: Config,
    *,
    with_answers: bool,
    most: int = 0,
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the loss of the model as it is, and greedy answers too where the held-out data has some.

    `most`: how many answers; 0 for all that come within a quarter of ``round.deadline``.
    `tell`: called with (examples done, all) of the loss, then of the answers.
    """
    start = time.monotonic()
    loss = evaluate_loss(
        language.model, held_out.loss, config.eval.batch_size, lambda done: tell(done, len(held_out.loss))
    )
    facts: dict[str, Any] = {
        "eval/loss": loss.loss,
        "eval/perplexity": loss.perplexity,
        "examples": loss.examples,
        "tokens": loss.tokens,
    }
    prompts = held_out.answers
    if with_answers and prompts is not None:
        total, begin, limit = len(prompts.tokens), time.monotonic(), _SHARE * config.round.deadline

        def go_on(answered: int) -> bool:
            tell(answered, total)
            return answered < most if most else time.monotonic() - begin < limit

        at_once = min(config.eval.batch_size, _AT_ONCE)
        generated = evaluate_generation(
            language.model, language.tokenizer, prompts, config.eval.max_new_tokens, at_once, go_on
        )
        if (count := len(generated.answers)) < total:
            log.warning("Rouge-L is of %d of %d answers, before and after: more would take too long", count, total)
        facts["answered"] = count
        facts["eval/rougeL"] = generated.rouge_l
        facts["cut_prompts"] = generated.cut_prompts
        facts["answers"] = [
            {
                "prompt": language.tokenizer.decode(ids, skip_special_tokens=True),
                "reference": references[0],
                "answer": answer,
            }
            for ids, references, answer in zip(prompts.tokens, prompts.references, generated.answers, strict=False)
        ][:_SHOWN_ANSWERS]
    return facts | {"seconds": time.monotonic() - start}
