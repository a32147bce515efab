"""How the parts of a method are timed on this machine, for a plan."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from fedtune_strategies.language.model import LanguageModel


def random_batch(language: LanguageModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Make a batch of random tokens; the second half of each row is its response."""
    ids = torch.randint(0, len(language.tokenizer), (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def median_seconds(work: Callable[[], object], clock: Callable[[], float], repeats: int = 3) -> float:
    """Time some work several times, after one run that does not count: kernels are compiled in it."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)
