"""Rows to token ids, and token ids to batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.chat import changed, fold_system, render
from fedtune_strategies.language.data import Row

IGNORE = -100
"""Label of a token that the loss leaves out; torch's and transformers' convention."""

CHUNK = 1000
"""Rows tokenised at a time: token ids are Python lists until they are packed."""

Batch = dict[str, torch.Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Tokenised rows."""

    tokens: list[NDArray[np.int32]]  # prompt and response, at most the sequence length
    prompt_lengths: list[int]  # how many of an example's first tokens belong to the prompt, on which there is no loss
    references: list[tuple[str, ...]]  # the accepted answers of each example; empty for plain text
    pad_id: int  # token id that fills a batch up
    # how many prompts lost their beginning, how many responses their end, and how many rows had no token to learn
    cut_prompts: int = 0
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, to be answered."""

    tokens: list[list[int]]  # whole prompts, of any length
    references: list[tuple[str, ...]]  # the accepted answers of each prompt

    def __len__(self) -> int:
        return len(self.tokens)


def tokenise(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> Examples:
    """Turn rows into token ids of at most `seq_length`.

    Prompt and response are tokenised together, as they will be read, and the prompt once more alone: the response
    begins where the two differ. Where they do not fit together the prompt loses its beginning (after the tokenizer's
    beginning-of-sequence token), down to a quarter of the sequence; then the response loses its end. Both are counted,
    and the latter is warned of; where no response fits, it is a DataError.
    """
    tokens, prompt_lengths, references = [], [], []
    cut_prompts = truncated = dropped = 0
    for row, whole, start in _encode(rows, tokenizer):
        ids, kept = _fit(whole, start, seq_length, tokenizer.bos_token_id)
        if len(ids) <= max(kept, 1):  # the first token of all is predicted by nothing
            dropped += 1
            continue
        cut_prompts += kept < start
        truncated += len(ids) - kept < len(whole) - start
        tokens.append(np.asarray(ids, dtype=np.int32))
        prompt_lengths.append(kept)
        references.append(row.references)
    if dropped == len(rows) or (truncated + dropped == len(rows) and rows[0].prompt is not None):
        line = f"not one of the {len(rows)} responses fits in {seq_length} tokens; raise 'train.seq-length'"
        raise DataError(line, public=line)
    if truncated:
        log.warning("%d of %d responses lost their end: longer than %d tokens", truncated, len(rows), seq_length)
    pad_id = int(tokenizer.pad_token_id)
    return Examples(tokens, prompt_lengths, references, pad_id, cut_prompts, truncated, dropped)


def tokenise_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Turn the prompts of rows into token ids, each alone and whole, as a user would send it."""
    if any(row.prompt is None for row in rows):
        raise DataError("plain text has no answers to compare with; set 'eval.answers' to 0, or evaluate on prompts")
    texts = [render(row, tokenizer, number)[0] for number, row in enumerate(fold_system(rows, tokenizer), start=1)]
    options = _token_options(rows[0], tokenizer)
    tokens = tokenizer(texts, **options).input_ids
    # Some tokenizers close every text, but the model is to answer the prompt.
    closed = options["add_special_tokens"] and tokenizer.eos_token_id is not None
    tokens = [ids[:-1] if closed and ids[-1:] == [tokenizer.eos_token_id] else ids for ids in tokens]
    tokens = [_begun_once(ids, tokenizer) for ids in tokens]
    return Prompts(tokens, [row.references for row in rows])


def last_tokens(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """Return the last `room` token ids; a beginning-of-sequence token at the head stays there."""
    if len(ids) <= room:
        return ids
    head = ids[:1] if room > 1 and ids[0] == bos_id else []
    return head + ids[len(ids) - room + len(head) :]


def batches(examples: Examples, batch_size: int, steps: int, key: Sequence[int | str]) -> Iterator[Batch]:
    """Draw `steps` batches, the same ones for the same key on every machine.

    Examples are shuffled without replacement, epoch after epoch; a batch may span two epochs. The order comes from the
    raw stream of Philox, which NumPy keeps stable across releases.
    """
    count = len(examples)
    epochs = -(-steps * batch_size // count)
    bits = np.random.Philox(np.random.SeedSequence([_key_word(part) for part in key]))
    order = np.concatenate([np.argsort(bits.random_raw(count), kind="stable") for _ in range(epochs)])
    for step in range(steps):
        yield collate(examples, order[step * batch_size : (step + 1) * batch_size])


def collate(examples: Examples, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
    """Stack examples into one batch, padded on the right.

    ``input_ids``, ``attention_mask`` and ``labels`` are int64 [batch, longest]; labels are `IGNORE` on prompts and
    padding.
    """
    longest = max(len(examples.tokens[i]) for i in indices)
    input_ids = np.full((len(indices), longest), examples.pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORE)
    for position, i in enumerate(indices):
        ids, start = examples.tokens[i], examples.prompt_lengths[i]
        input_ids[position, : len(ids)] = ids
        mask[position, : len(ids)] = 1
        labels[position, start : len(ids)] = ids[start:]
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Row, list[int], int]]:
    """Yield each row, the token ids of its prompt and response, and where the response begins in them."""
    folded = fold_system(rows, tokenizer)
    if moved := changed(rows, folded):
        taken = "the model's chat template takes no system message; its text stands before the user's first"
        log.warning("%d of %d rows: %s", moved, len(rows), taken)
    rows = folded
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        texts = [render(row, tokenizer, number) for number, row in enumerate(chunk, start=first + 1)]
        options = _token_options(chunk[0], tokenizer)
        prompts = tokenizer([prompt for prompt, _ in texts], **options).input_ids
        wholes = tokenizer([prompt + response for prompt, response in texts], **options).input_ids
        for row, prompt, whole in zip(chunk, prompts, wholes, strict=True):
            ids = _begun_once(whole, tokenizer)
            yield row, ids, 0 if row.prompt is None else _common_prefix(_begun_once(prompt, tokenizer), ids)


def _token_options(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    # A chat template writes the special tokens itself; other text gets the tokenizer's own.
    special = tokenizer.chat_template is None or row.prompt is None
    return {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}


def _begun_once(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Drop the tokenizer's beginning of sequence before text that has its own."""
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def _common_prefix(left: list[int], right: list[int]) -> int:
    if right[: len(left)] == left:
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))


def _fit(ids: list[int], start: int, seq_length: int, bos_id: int | None) -> tuple[list[int], int]:
    """Cut prompt (tokens before `start`) and response to `seq_length`; return ids and the new start."""
    room = min(start, max(seq_length - (len(ids) - start), seq_length // 4))
    return last_tokens(ids[:start], room, bos_id) + ids[start : start + seq_length - room], room


def _key_word(part: int | str) -> int:
    if isinstance(part, int):
        return part % 2**64
    return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
