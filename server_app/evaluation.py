"""Held-out evaluation of the global model on the server, recorded in the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune_strategies.config import Config
from fedtune_strategies.language.data import Row, read_rows
from fedtune_strategies.language.evaluation import evaluate_generation, evaluate_loss
from fedtune_strategies.language.examples import Examples, Prompts, tokenise, tokenise_prompts
from fedtune_strategies.language.model import LanguageModel

_SHOWN_ANSWERS = 16


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
    asked = _spread(rows, config.eval.answers) if rows[0].prompt is not None else []
    return HeldOut(loss, tokenise_prompts(asked, language.tokenizer) if asked else None)


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """Return the rows in the middle of `count` equal parts of the file, which may be sorted."""
    count = min(count, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def evaluate(language: LanguageModel, held_out: HeldOut, config: Config, *, with_answers: bool) -> dict[str, Any]:
    """Measure the loss of the model as it is, and greedy answers too where the held-out data has some."""
    start = time.monotonic()
    loss = evaluate_loss(language.model, held_out.loss, config.eval.batch_size)
    facts: dict[str, Any] = {
        "eval/loss": loss.loss,
        "eval/perplexity": loss.perplexity,
        "examples": loss.examples,
        "tokens": loss.tokens,
    }
    prompts = held_out.answers
    if with_answers and prompts is not None:
        generated = evaluate_generation(
            language.model, language.tokenizer, prompts, config.eval.max_new_tokens, config.eval.batch_size
        )
        facts["eval/rougeL"] = generated.rouge_l
        facts["cut_prompts"] = generated.cut_prompts
        facts["answers"] = [
            {
                "prompt": language.tokenizer.decode(ids, skip_special_tokens=True),
                "reference": references[0],
                "answer": answer,
            }
            for ids, references, answer in zip(prompts.tokens, prompts.references, generated.answers, strict=True)
        ][:_SHOWN_ANSWERS]
    return facts | {"seconds": time.monotonic() - start}
