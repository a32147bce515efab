"""What a model knows: held-out loss, perplexity, and Rouge-L of its greedy answers."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import regex
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune_strategies.language.examples import Examples, Prompts, collate, last_tokens
from fedtune_strategies.language.loss import token_losses
from fedtune_strategies.language.model import context_length

_UNSPACED = r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]"
_WORD = r"[\p{L}\p{M}\p{N}]"
_TOKENS = regex.compile(rf"(?V1)[{_UNSPACED}&&{_WORD}]\p{{M}}*|[{_WORD}--{_UNSPACED}]+|(?P<sign>\S)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of a model."""

    loss: float  # mean cross-entropy per response token over all examples, in nats
    perplexity: float  # exp(loss)
    # how many were measured
    tokens: int
    examples: int


@dataclass(frozen=True)
class GenerationEvaluation:
    """Greedy answers of a model and how well they match."""

    rouge_l: float  # mean F1, 0 to 1
    answers: list[str]  # one per prompt
    # how many prompts lost their beginning, since they do not fit in the model's context beside an answer
    cut_prompts: int


@torch.inference_mode()
def evaluate_loss(
    model: torch.nn.Module, examples: Examples, batch_size: int = 8, tell: Callable[[int], object] = lambda done: None
) -> Evaluation:
    """Measure the loss on held-out examples; every response token counts the same, in any batch."""
    total, tokens, done = 0.0, 0, 0
    for indices in _by_length([len(ids) for ids in examples.tokens], batch_size):
        losses = token_losses(model, collate(examples, indices))
        total += losses.sum(dtype=torch.float64).item()
        tokens += losses.numel()
        done += len(indices)
        tell(done)
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
    """Answer prompts greedily, without special tokens and outer spaces; too long prompts lose their beginning."""
    room = _prompt_room(model, max_new_tokens)
    kept = [last_tokens(list(prompt), room, tokenizer.bos_token_id) for prompt in prompts]
    fitting = [ids or [tokenizer.pad_token_id] for ids in kept]
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
    """Mean Rouge-L F1 (Lin, 2004) without stemming, by the ``rouge-score`` package, for text in any script.

    Of a prediction's references the best match counts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_ScriptTokenizer())
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score_multi(ones, prediction)["rougeL"].fmeasure for prediction, ones in pairs]
    return sum(scores) / len(scores)


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    go_on: Callable[[int], bool] = lambda answered: True,
) -> GenerationEvaluation:
    """Answer held-out prompts and compare with their references.

    `go_on` is asked after each batch, with how many are answered: where it says no, those are all.
    """
    room = _prompt_room(model, max_new_tokens)
    cut = sum(len(ids) > room for ids in prompts.tokens)
    if cut:
        log.warning(
            "%d of %d prompts lost their beginning: more than %d tokens, which leave no room for an answer of %d",
            cut, len(prompts), room, max_new_tokens,
        )  # fmt: skip
    answers: list[str] = []
    while not answers or (len(answers) < len(prompts.tokens) and go_on(len(answers))):
        part = prompts.tokens[len(answers) : len(answers) + batch_size]
        answers += generate_answers(model, tokenizer, part, max_new_tokens, batch_size)
    return GenerationEvaluation(rouge_l(answers, prompts.references[: len(answers)]), answers, cut)


class _ScriptTokenizer:
    """Tokens for Rouge in any script; of ASCII text with a word in it the same as the package's own."""

    def tokenize(self, text: str) -> list[str]:
        """Return words, and single characters where a script puts no spaces between words."""
        found = list(_TOKENS.finditer(unicodedata.normalize("NFC", text.lower())))
        words = [match[0] for match in found if match["sign"] is None]
        return words or [match[0] for match in found]  # an answer may be signs alone, such as ">="


def _prompt_room(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Return how many tokens of a prompt fit in the model's context beside an answer."""
    return max((context_length(model.config) or 1 << 30) - max_new_tokens, 1)


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
