"""Export of a tuned model as a plain Hugging Face folder with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedtune_strategies.config import Config
from fedtune_strategies.errors import ResourceError
from fedtune_strategies.language.model import LanguageModel, save_model
from server_app.ledger import Ledger


def export_model(language: LanguageModel, config: Config, ledger: Ledger, round: int, folder: Path) -> Path:
    """Write the model as it is into a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The folder appears whole or not at all: it is written beside its place and then renamed.

    Parameters
    ----------
    language : LanguageModel
        The global model after `round`.
    config : Config
        The run configuration, for the model card.
    ledger : Ledger
        The run's ledger, for the model card.
    round : int
        The round.
    folder : Path
        Where to write; an earlier export there is replaced.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    ResourceError
        The disk is full or read-only.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(language.model, language.tokenizer, partial)
        (partial / "README.md").write_text(model_card(config, ledger, round), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise ResourceError(f"cannot write {folder}: {error.strerror}; free space, then start the run again.") from None
    return folder


def model_card(config: Config, ledger: Ledger, round: int) -> str:
    """Describe how a model came about, as a Hugging Face model card.

    Parameters
    ----------
    config, ledger, round
        See `export_model`.

    Returns
    -------
    str
        Markdown with a YAML header.
    """
    replies = [record for record in ledger.records("reply") if record.round <= round]
    evaluations = [record for record in ledger.records("evaluation") if record.round <= round]
    nodes = sorted({record.node for record in replies})
    sent = sum(record.body["bytes_down"] + record.body["bytes_up"] for record in replies)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {config.model.name}",
        "tags: [federated-learning, fedtune]",
        "---",
        f"# {Path(config.model.name).name}, tuned by {config.method.name}",
        "",
        f"All parameters of `{config.model.name}` were tuned with FedTune over {round} rounds on the data of "
        f"{len(nodes)} nodes, which did not leave them. The nodes and the server exchanged {sent:,} bytes of payload.",
        "",
        "| round | held-out loss (nats a token) | perplexity | Rouge-L |",
        "|---|---|---|---|",
        *(_row(record.round, record.body) for record in evaluations if "eval/rougeL" in record.body),
        "",
    ]
    return "\n".join(lines)


def _row(round: int, facts: dict[str, Any]) -> str:
    return f"| {round} | {facts['eval/loss']:.3f} | {facts['eval/perplexity']:.2f} | {facts['eval/rougeL']:.3f} |"
