"""How much of a batch does a reply of the seed-space gradient reveal, against a whole gradient? Prints a table.

    python benchmarks/revealed.py [--trials 24] [--rows 1 4]

The attacker is the server: it knows weights, pool and loss, and sees the K signs of the point that a node reached from
rows of Dolly on stories260K (data and model as for the comparison). It tries two things:

*tokens*: which of the vocabulary's tokens were in the batch. The signs, multiplied back into weights, point along the
batch's gradient; a token's row of the embedding moves most if the token was there. Shown is the area under the curve
over all tokens, 0.5 for a guess. "frequency" guesses by how often a token occurs in other rows: what an attacker knows
without any reply. "whole gradient" has the true gradient's rows; "with frequency" adds the logarithm of the frequency,
both in standard deviations.

*membership*: was a suspected row in the batch? Its own slopes, which the attacker computes, agree with the signs more
if it was. Area under the curve of rows that were there against others.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from comparison.protocols import STORIES, dolly
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.examples import Batch, Examples, collate, tokenise
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import load_model
from fedtune_strategies.seed_gradient import local_walk, slopes
from fedtune_strategies.seed_gradient.private import private_sum
from fedtune_strategies.seed_gradient.slopes import Slopes
from fedtune_strategies.seed_space import Pool, make_pool, tuned_parameters
from fedtune_strategies.seed_space.scaled import rms_scales, scaled

EMBEDDING = "model.embed_tokens.weight"
STEP = 0.01


class Attack:
    """A model, its owner's rows, and others that the attacker knows."""

    def __init__(self, folder: Path) -> None:
        self.language = load_model(str(STORIES), "float32", "cpu")
        self.model = self.language.model
        self.parameters = tuned_parameters(self.model)
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        files = dolly(folder, 0.5)
        rows = read_rows(str(files.pooled), "auto", "", False)
        self.examples: Examples = tokenise(rows, self.language.tokenizer, 96)
        half = len(self.examples) // 2
        self.owned, self.others = range(half), range(half, len(self.examples))
        self.vocabulary = len(self.base[EMBEDDING])
        self.frequency = np.zeros(self.vocabulary)
        for i in self.others:
            np.add.at(self.frequency, self.tokens(collate(self.examples, [i])), 1.0)

    def tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Return the batch's tokens, each once."""
        return np.unique(batch["input_ids"][batch["attention_mask"].bool()].numpy())

    def reset(self) -> None:
        """Put W_r back."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.base[name])

    def reply(self, batch: Batch, pool: Pool, steps: int, noise: float) -> Tensor:
        """Return the signs that the node sends after so many steps on the batch; with noise, clipped at 1."""

        def find(batch: Batch) -> Slopes:
            if not noise:
                return slopes(self.model, self.parameters, response_loss, batch, pool)
            rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["labels"]))]
            each = (slopes(self.model, self.parameters, response_loss, row, pool).g for row in rows)
            return Slopes(0.0, private_sum(each, 1.0, noise, pool.size) / len(rows))

        walk = local_walk(
            partial(pool.rebuild_model, self.parameters, self.base), pool, find, [batch] * steps, step=STEP
        )
        self.reset()
        return walk.theta.sign()

    def gradient_rows(self, batch: Batch) -> NDArray[np.float64]:
        """Return how far each row of the embedding moves in a whole gradient."""
        parameter = self.parameters[EMBEDDING]
        (gradient,) = torch.autograd.grad(response_loss(self.model, batch), parameter)
        return gradient.double().norm(dim=1).numpy()

    def rows(self, signs: Tensor, pool: Pool) -> NDArray[np.float64]:
        """Return how far each row of the embedding moves where the signs point."""
        still = torch.zeros_like(self.base[EMBEDDING])
        return pool.rebuild(EMBEDDING, still, signs).double().norm(dim=1).numpy()

    def agreement(self, signs: Tensor, index: int, pool: Pool) -> float:
        """Return how well a suspected row's own slopes agree with the signs."""
        g = slopes(self.model, self.parameters, response_loss, collate(self.examples, [index]), pool).g
        return float(-(g * signs).sum() / g.norm())


def area(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Return the probability that one of the first is above one of the second; a tie counts half."""
    difference = positive[:, None] - negative[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values in standard deviations from their mean."""
    return (values - values.mean()) / values.std()


def measure(attack: Attack, rows: int, steps: int, seeds: int, noise: float, trials: int) -> str:
    """Make one line of the table."""
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in ("frequency", "signs", "both", "gradient", "gradient, both")}
    there: list[float] = []
    elsewhere: list[float] = []
    for trial in range(trials):
        pool = scaled(make_pool("walsh", trial + 1, seeds), rms_scales(attack.base))
        chosen = random.choice(attack.owned, rows, replace=False)
        batch = collate(attack.examples, chosen)
        signs = attack.reply(batch, pool, steps, noise)
        guesses: dict[str, Callable[[], NDArray[np.float64]]] = {
            "frequency": lambda: attack.frequency,
            "signs": lambda signs=signs, pool=pool: attack.rows(signs, pool),  # type: ignore[misc]
            "gradient": lambda batch=batch: attack.gradient_rows(batch),  # type: ignore[misc]
        }
        inside = np.isin(np.arange(attack.vocabulary), attack.tokens(batch))
        scores = {name: guess() for name, guess in guesses.items()}
        known = standard(np.log(attack.frequency + 0.5))
        scores["both"] = standard(scores["signs"]) + known
        scores["gradient, both"] = standard(np.log(scores["gradient"] + 1e-9)) + known
        for name, score in scores.items():
            found[name].append(area(score[inside], score[~inside]))
        there.append(attack.agreement(signs, int(chosen[0]), pool))
        elsewhere.append(attack.agreement(signs, int(random.choice(attack.others)), pool))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    member = area(np.array(there), np.array(elsewhere))
    cells = [rows, steps, seeds, f"{noise:g}" if noise else "–", *(f"{means[name]:.2f}" for name in found),
             f"{member:.2f}"]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    head = ["rows", "steps", "K", "noise", "tokens: frequency", "signs", "signs with frequency", "whole gradient",
            "whole gradient with frequency", "membership by signs"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + " ---: |" * len(head), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder))
        for rows in args.rows:
            for steps, seeds, noise in ((1, 16384, 0.0), (20, 16384, 0.0), (1, 1024, 0.0), (1, 16384, 1.0)):
                print(measure(attack, rows, steps, seeds, noise, args.trials), flush=True)


if __name__ == "__main__":
    main()
