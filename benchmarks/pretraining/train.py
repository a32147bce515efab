"""Train the embedded tokenizer and base model from nothing: ``python -m pretraining.train --out FOLDER``.

The trained folder is shipped; only a change of the data or of the architecture calls for this script.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pretraining.corpus import Document, documents

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CONTEXT = 256
IGNORE = -100

Encoded = tuple[list[int], list[int]]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn byte-level pairs until every word of the corpus is one token; any other text falls back to its bytes."""
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
    """Make the untrained model: four Llama layers, about 2.1 million parameters, input and output embedding tied."""
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


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Turn a document into token ids from ``<s>`` to ``</s>`` and labels, -100 where the model is given the text."""
    pieces = tokenizer([text for turn in document for text in turn], add_special_tokens=False)["input_ids"]
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for given, said in zip(pieces[::2], pieces[1::2], strict=True):
        ids += given + said
        labels += [IGNORE] * len(given) + said
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def batches(
    corpus: Iterator[Document], tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of documents of like length: eight are read at a time, and sorted by length."""
    shuffle = random.Random(0)
    while encoded := [encode(document, tokenizer) for document in islice(corpus, 8 * size)]:
        encoded.sort(key=lambda item: len(item[0]))
        for first in shuffle.sample(range(0, len(encoded), size), 8):
            cut = encoded[first : first + size]
            longest = len(cut[-1][0])
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in cut]),
                torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in cut]),
            )


def train_model(
    model: LlamaForCausalLM, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, peak_lr: float
) -> None:
    """Pretrain in place with AdamW: a warm-up, a constant learning rate, and a decay to zero over the last 20 %."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, (steps - step) / (0.2 * steps))
    )
    begun, mean_loss = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(islice(stream, steps), start=1):
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
    parser.add_argument("--steps", type=int, default=1750, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="documents in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and the first weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of additions: the same weights from one run to the next
    torch.manual_seed(arguments.seed)
    sample = islice(documents(arguments.seed), 10_000)
    tokenizer = train_tokenizer(["".join(given + said for given, said in document) for document in sample])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    stream = batches(documents(arguments.seed), tokenizer, arguments.batch_size)
    train_model(model, stream, arguments.steps, arguments.lr)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    # transformers 5 writes the name of a class that transformers 4 does not have; both know this one.
    config = arguments.out / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


if __name__ == "__main__":
    main()
