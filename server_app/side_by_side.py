"""Ask a run's base model and its tuned model the same, to see what the run did."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedtune_strategies.errors import FedTuneError
from fedtune_strategies.language.data import Message, Row, read_rows
from fedtune_strategies.language.evaluation import generate_answers
from fedtune_strategies.language.examples import tokenise_prompts
from server_app.base_model import load_base
from server_app.export import open_run
from server_app.ledger import Ledger


class SideBySide:
    """Both models of a run, in memory at once.

    `run`: the run's folder; the run may not be over.
    `round`: the tuned model is that after this round; after the last one by default.
    `longest`: most tokens of an answer.
    `model`: where the base model is, if not where it was.
    `prompts`: those of the operator's held-out file, in its order; empty where it cannot be read.
    Raises `LedgerError`: there is no run, or it has not got so far.
    Raises `ModelError`: the run's base model is not there any more.
    """

    def __init__(self, run: Path, round: int | None, longest: int, model: str = "") -> None:
        ledger = Ledger.read(run)
        config, self._tuned, rebuild = open_run(run, ledger, model)
        self.round = rebuild(round)
        self._base = load_base(config, ledger, model)[0]
        self._longest = longest
        self.prompts: list[str | list[Message]] = []
        with contextlib.suppress(FedTuneError):
            rows = read_rows(config.eval.data, config.eval.format) if config.eval.data else []
            self.prompts = [row.prompt for row in rows if row.prompt is not None]

    def ask(self, prompt: str | list[Message]) -> tuple[str, str]:
        """Return the greedy answers of the base model and of the tuned one.

        A text is sent as the held-out file has its prompts: as it stands, or as a user's message.
        """
        if isinstance(prompt, str) and not (self.prompts and isinstance(self.prompts[0], str)):
            prompt = [{"role": "user", "content": prompt}]
        answers = []
        for one in (self._base, self._tuned):
            tokens = tokenise_prompts([Row(prompt, "")], one.tokenizer).tokens
            answers += generate_answers(one.model, one.tokenizer, tokens, self._longest)
        return answers[0], answers[1]
