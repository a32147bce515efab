"""Train the embedded tokenizer and base model from nothing: ``python -m fedtune_strategies.tiny.train --out FOLDER``.

The trained folder is shipped; only a change of the data or of the architecture calls for this script.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune_strategies.tiny.corpus import Document, documents

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CONTEXT = 256


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn byte-level pairs until every word of the corpus is one token; any other text falls back to its bytes.

    Parameters
    ----------
    texts : list of str
        The corpus.

    Returns
    -------
    PreTrainedTokenizerFast
        Begins a text with ``<s>``; has ``</s>`` and ``<pad>``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model: four Llama layers, input and output embedding tied.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        Gives the vocabulary's size and the special tokens.

    Returns
    -------
    LlamaForCausalLM
        About 2.1 million parameters, float32.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,  # about width ** -0.5; transformers' 0.02 suits models ten times as wide
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(items: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Turn documents into token ids.

    Parameters
    ----------
    items : iterable of Document
        The corpus.
    tokenizer : PreTrainedTokenizerFast
        As trained.

    Returns
    -------
    list of (list of int, list of int)
        Of each document, the ids from ``<s>`` to the end of the question, and those of the reply up to ``</s>``.
    """
    questions, replies = zip(*items, strict=True)
    return list(
        zip(
            tokenizer(list(questions))["input_ids"],
            [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(replies), add_special_tokens=False)["input_ids"]],
            strict=True,
        )
    )


def batches(
    encoded: list[tuple[list[int], list[int]]], size: int, pad: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch of batches of documents of like length.

    Parameters
    ----------
    encoded : list of (list of int, list of int)
        As `encode` returns them.
    size : int
        Documents in a batch.
    pad : int
        Id that fills the short ones up on the right.
    rng : random.Random
        Orders documents and batches.

    Yields
    ------
    tuple of torch.Tensor
        Token ids, and labels that are -100 outside of the replies: int64, shape (size, longest).
    """
    length = [len(question) + len(reply) for question, reply in encoded]
    order = sorted(range(len(encoded)), key=lambda i: (length[i], rng.random()))
    cuts = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    rng.shuffle(cuts)
    for cut in cuts:
        longest = max(length[i] for i in cut)
        ids = torch.full((size, longest), pad)
        labels = torch.full((size, longest), -100)
        for row, i in enumerate(cut):
            question, reply = encoded[i]
            ids[row, : length[i]] = torch.tensor(question + reply)
            labels[row, len(question) : length[i]] = torch.tensor(reply)
        yield ids, labels


def train_model(
    model: LlamaForCausalLM,
    encoded: list[tuple[list[int], list[int]]],
    pad: int,
    batch_size: int,
    peak_lr: float,
    seed: int,
) -> None:
    """Pretrain for one epoch, in place: AdamW, warm-up and cosine schedule, loss over the replies.

    Parameters
    ----------
    model : LlamaForCausalLM
        Changed in place.
    encoded : list of (list of int, list of int)
        As `encode` returns them.
    pad : int
        Padding id.
    batch_size : int
        Documents in a step.
    peak_lr : float
        Learning rate after the warm-up.
    seed : int
        Orders the documents.
    """
    steps, warmup = len(encoded) // batch_size, 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    begun, mean_loss = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(batches(encoded, batch_size, pad, random.Random(seed)), start=1):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {mean_loss:.3f}  {time.monotonic() - begun:.0f} s", flush=True)


def main() -> None:
    """Train tokenizer and model, and save the folder in half precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--documents", type=int, default=80_000, help="pretraining documents")
    parser.add_argument("--batch-size", type=int, default=16, help="documents in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus, the first weights and the order")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of additions: the same weights from one run to the next
    torch.manual_seed(arguments.seed)
    corpus = list(documents(arguments.documents, arguments.seed))
    tokenizer = train_tokenizer([question + reply for question, reply in corpus[:20_000]])
    model = new_model(tokenizer)
    encoded = encode(corpus, tokenizer)
    tokens = sum(len(question) + len(reply) for question, reply in encoded)
    print(f"{model.num_parameters():,} parameters, {tokens:,} tokens, vocabulary {len(tokenizer)}", flush=True)
    train_model(model, encoded, tokenizer.pad_token_id, arguments.batch_size, arguments.lr, arguments.seed)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    # transformers 5 writes the name of a class that transformers 4 does not have; both know this one.
    config = arguments.out / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


if __name__ == "__main__":
    main()
