"""Held-out evaluation of the global model on the server, recorded in the ledger."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune_strategies.config import Config
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.evaluation import evaluate_generation, evaluate_loss
from fedtune_strategies.language.examples import Examples, tokenise
from fedtune_strategies.language.model import LanguageModel

_SHOWN_ANSWERS = 16


@dataclass(frozen=True)
class HeldOut:
    """The operator's held-out examples, tokenised.

    Attributes
    ----------
    loss : Examples
        For loss and perplexity.
    answers : Examples or None
        For Rouge-L of greedy answers, a spread over the file; None where ``eval.answers`` is 0.
    """

    loss: Examples
    answers: Examples | None


def load_held_out(config: Config, language: LanguageModel) -> HeldOut | None:
    """Read and tokenise ``eval.data``; None where it is empty.

    Raises
    ------
    DataError
        The file is missing, empty or malformed.
    """
    if not config.eval.data:
        return None
    rows = read_rows(Path(config.eval.data), config.eval.format)

    def spread(count: int) -> Examples:
        stride = max(1, len(rows) // count)
        return tokenise(rows[::stride][:count], language.tokenizer, config.train.seq_length)

    return HeldOut(spread(config.eval.max_examples), spread(config.eval.answers) if config.eval.answers else None)


def evaluate(language: LanguageModel, held_out: HeldOut, config: Config, *, with_answers: bool) -> dict[str, Any]:
    """Measure the model as it is.

    Parameters
    ----------
    language : LanguageModel
        The global model.
    held_out : HeldOut
        From `load_held_out`.
    config : Config
        The run configuration.
    with_answers : bool
        Also answer greedily and measure Rouge-L, unless the held-out data is plain text.

    Returns
    -------
    dict
        ``eval/loss`` (nats a token), ``eval/perplexity``, ``seconds``; with answers also ``eval/rougeL`` (F1, 0 to
        1) and some ``answers`` beside their prompts and references.
    """
    start = time.monotonic()
    loss = evaluate_loss(language.model, held_out.loss, config.eval.batch_size)
    facts: dict[str, Any] = {
        "eval/loss": loss.loss,
        "eval/perplexity": loss.perplexity,
        "examples": loss.examples,
        "tokens": loss.tokens,
    }
    examples = held_out.answers
    if with_answers and examples is not None and all(examples.references):
        generated = evaluate_generation(
            language.model, language.tokenizer, examples, config.eval.max_new_tokens, config.eval.batch_size
        )
        facts["eval/rougeL"] = generated.rouge_l
        facts["answers"] = [
            {
                "prompt": language.tokenizer.decode(ids[:length], skip_special_tokens=True),
                "reference": references[0],
                "answer": answer,
            }
            for ids, length, references, answer in zip(
                examples.tokens, examples.prompt_lengths, examples.references, generated.answers, strict=True
            )
        ][:_SHOWN_ANSWERS]
    return facts | {"seconds": time.monotonic() - start}
