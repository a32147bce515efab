"""Train the embedded tokenizer and base model from nothing: ``python -m fedtune_strategies.tiny.train --out FOLDER``.

The trained folder is shipped; only a change of the data or of the architecture calls for this script.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune_strategies.tiny.corpus import documents

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
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(encoded: list[list[int]], size: int, pad: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Yield one epoch of batches of documents of like length.

    Parameters
    ----------
    encoded : list of list of int
        Token ids of each document.
    size : int
        Documents in a batch.
    pad : int
        Id that fills the short ones up on the right.
    rng : random.Random
        Orders documents and batches.

    Yields
    ------
    torch.Tensor
        int64, shape (size, longest).
    """
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), rng.random()))
    cuts = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    rng.shuffle(cuts)
    for cut in cuts:
        longest = max(len(encoded[i]) for i in cut)
        yield torch.tensor([encoded[i] + [pad] * (longest - len(encoded[i])) for i in cut])


def train_model(
    model: LlamaForCausalLM, encoded: list[list[int]], pad: int, batch_size: int, peak_lr: float, seed: int
) -> None:
    """Pretrain for one epoch, in place: AdamW, cosine schedule with warm-up, loss over every token.

    Parameters
    ----------
    model : LlamaForCausalLM
        Changed in place.
    encoded : list of list of int
        Token ids of each document, ``</s>`` included.
    pad : int
        Padding id, left out of the loss.
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
    for step, ids in enumerate(batches(encoded, batch_size, pad, random.Random(seed)), start=1):
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == pad, -100), use_cache=False).loss
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
    parser.add_argument("--documents", type=int, default=160_000, help="pretraining documents")
    parser.add_argument("--batch-size", type=int, default=32, help="documents in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus, the first weights and the order")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of additions: the same weights from one run to the next
    torch.manual_seed(arguments.seed)
    texts = list(documents(arguments.documents, arguments.seed))
    tokenizer = train_tokenizer(texts[:20_000])
    model = new_model(tokenizer)
    encoded = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    print(f"{model.num_parameters():,} parameters, {sum(map(len, encoded)):,} tokens, vocabulary {len(tokenizer)}")
    train_model(model, encoded, tokenizer.pad_token_id, arguments.batch_size, arguments.lr, arguments.seed)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    # transformers 5 writes the name of a class that transformers 4 does not have; both know this one.
    config = arguments.out / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


if __name__ == "__main__":
    main()
