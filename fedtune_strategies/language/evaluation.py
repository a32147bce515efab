"""What a model knows: held-out loss, perplexity, and Rouge-L of its greedy answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.examples import Examples, collate
from fedtune_strategies.language.loss import token_losses
from fedtune_strategies.language.model import context_length


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of a model.

    Attributes
    ----------
    loss : float
        Mean cross-entropy per response token over all examples, in nats.
    perplexity : float
        exp(loss).
    tokens, examples : int
        How many were measured.
    """

    loss: float
    perplexity: float
    tokens: int
    examples: int


@dataclass(frozen=True)
class GenerationEvaluation:
    """Greedy answers of a model and how well they match.

    Attributes
    ----------
    rouge_l : float
        Mean F1, 0 to 1.
    answers : list of str
        One per example.
    """

    rouge_l: float
    answers: list[str]


@torch.inference_mode()
def evaluate_loss(model: torch.nn.Module, examples: Examples, batch_size: int = 8) -> Evaluation:
    """Measure the loss on held-out examples.

    Every response token counts the same, whatever batch it falls in.

    Parameters
    ----------
    model : torch.nn.Module
    examples : Examples
    batch_size : int
        Changes speed and memory, and the result by rounding only.

    Returns
    -------
    Evaluation
    """
    total, tokens = 0.0, 0
    for indices in _by_length([len(ids) for ids in examples.tokens], batch_size):
        losses = token_losses(model, collate(examples, indices))
        total += losses.sum(dtype=torch.float64).item()
        tokens += losses.numel()
    loss = total / tokens
    return Evaluation(loss, math.exp(loss) if loss < 700 else math.inf, tokens, len(examples))


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> list[str]:
    """Answer prompts greedily.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        With a padding token.
    prompts : sequence of token id sequences
        Prompts that leave no room for the answer in the model's context lose their beginning.
    max_new_tokens : int
    batch_size : int

    Returns
    -------
    list of str
        In the order of the prompts, without special tokens and outer spaces.
    """
    room = max((context_length(model) or 1 << 30) - max_new_tokens, 1)
    fitting = [list(prompt[-room:]) or [tokenizer.pad_token_id] for prompt in prompts]
    stop = _stop_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,  # else the model's own, which is for chatting
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop or None,
    )
    answers = [""] * len(fitting)
    for indices in _by_length([len(prompt) for prompt in fitting], batch_size):
        input_ids, mask = _pad_left([fitting[i] for i in indices], tokenizer.pad_token_id)
        output = model.generate(  # type: ignore[operator]  # known to the class of a concrete model only
            input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
        for i, ids in zip(indices, output[:, input_ids.shape[1] :].tolist(), strict=True):
            answer = list(takewhile(lambda token: token not in stop, ids))
            answers[i] = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    return answers


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean Rouge-L F1 (Lin, 2004) without stemming, as the ``rouge-score`` package defines it.

    Parameters
    ----------
    predictions : sequence of str
    references : sequence of sequences of str
        Accepted answers of each prediction, of which the best match counts.

    Returns
    -------
    float
        0 to 1. The package reads letters a to z and digits only: text in other scripts scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(predictions, references, strict=True)
    scores = [max(scorer.score(one, prediction)["rougeL"].fmeasure for one in ones) for prediction, ones in pairs]
    return sum(scores) / len(scores)


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> GenerationEvaluation:
    """Answer the prompts of held-out examples and compare with their references.

    Parameters
    ----------
    model, tokenizer, max_new_tokens, batch_size
        As `generate_answers`.
    examples : Examples
        Of prompts and responses, not plain text.

    Returns
    -------
    GenerationEvaluation

    Raises
    ------
    DataError
        The examples are plain text.
    """
    if not all(examples.references):
        raise DataError("plain text has no answers to compare with; set 'eval.answers' to 0, or evaluate on prompts")
    prompts = [ids[:length].tolist() for ids, length in zip(examples.tokens, examples.prompt_lengths, strict=True)]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
    return GenerationEvaluation(rouge_l(answers, examples.references), answers)


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group indices of similar length, so that batches carry little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _pad_left(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack prompts so that all end in the last column; return token ids and attention mask."""
    longest = max(map(len, prompts))
    input_ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids), torch.tensor(mask)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A model may stop at other tokens than the tokenizer's own, e.g. at the end of a chat turn.
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
