"""What a model knows: held-out loss, perplexity, and Rouge-L of its greedy answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune_strategies.language.examples import Examples, collate
from fedtune_strategies.language.loss import token_losses


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
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    prompts = [list(prompt)[-max(context - max_new_tokens, 1) :] for prompt in prompts]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_stop_ids(model, tokenizer),
    )
    answers = [""] * len(prompts)
    for indices in _by_length([len(prompt) for prompt in prompts], batch_size):
        longest = max(len(prompts[i]) for i in indices)
        padding = [longest - len(prompts[i]) for i in indices]
        input_ids = [[tokenizer.pad_token_id] * pad + prompts[i] for pad, i in zip(padding, indices, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        output = model.generate(
            torch.tensor(input_ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
        for i, ids in zip(indices, output[:, longest:].tolist(), strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
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
    """
    prompts = [ids[:length].tolist() for ids, length in zip(examples.tokens, examples.prompt_lengths, strict=True)]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
    return GenerationEvaluation(rouge_l(answers, examples.references), answers)


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group indices of similar length, so that batches carry little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A model may stop at other tokens than the tokenizer's own, e.g. at the end of a chat turn.
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
