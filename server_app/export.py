"""Export of a tuned model as a plain Hugging Face folder with a model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune_strategies.config import Config
from fedtune_strategies.errors import LedgerError, ResourceError
from fedtune_strategies.folders import check_ours, make_folder, publish_folder, remove_folder
from fedtune_strategies.language.model import LanguageModel, save_model
from fedtune_strategies.method import register_messages
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_space import tuned_parameters
from fedtune_strategies.words import counted
from server_app.base_model import load_base
from server_app.ledger import Ledger
from server_app.rounds import restore
from server_app.run_view import Evaluation, RunView


def export_model(
    language: LanguageModel,
    config: Config,
    ledger: Ledger,
    round: int,
    folder: Path,
    *,
    without: Sequence[str] = (),
) -> Path:
    """Write the global model after a round into a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The folder appears whole or not at all: it is written beside its place and then renamed. An earlier export there is
    replaced. The model card names the nodes in `without` as left out.
    """
    folder = Path.cwd() / folder if folder.name else folder.resolve()  # "." has no name beside which to write
    check_ours(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        remove_folder(partial)
        make_folder(partial)
        save_model(language.model, language.tokenizer, partial)
        (partial / "README.md").write_text(model_card(config, ledger, round, without), encoding="utf-8")
        publish_folder(partial, folder)
    except OSError as error:
        raise ResourceError(f"cannot write {folder}: {error.strerror}; free space, then start the run again.") from None
    return folder


def export_round(run: Path, round: int | None, folder: Path, model: str = "") -> int:
    """Rebuild the model after a round (by default the last) from a run's ledger and export it, also during the run."""
    ledger = Ledger.read(run)
    config, language, rebuild = open_run(run, ledger, model)
    done = rebuild(round)
    export_model(language, config, ledger, done, folder)
    return done


def open_run(run: Path, ledger: Ledger, model: str = "") -> tuple[Config, LanguageModel, Callable[[int | None], int]]:
    """Load a run's configuration, its base model, and a function that takes the model to a round and names it.

    It goes to the last round for None. `model` is where the base model is, if not where it was.
    """
    started = ledger.last("start")
    if started is None:
        raise LedgerError(f"the run in {run} has not started: there is no model yet.")
    config = parse(started.body["config"])
    language, base, _ = load_base(config, ledger, model)

    def rebuild(round: int | None) -> int:
        strategy = register_messages(config.method.name).strategy(config, language.model, base)
        done, arrays = restore(strategy, ledger, round)
        if round not in (None, done):
            raise LedgerError(
                f"the run in {run} has {counted(done, 'round')}, not {round}: "
                "choose one of them, or 0 for the base model."
            )
        strategy.materialise(arrays, tuned_parameters(language.model))
        return done

    return config, language, rebuild


def model_card(config: Config, ledger: Ledger, round: int, without: Sequence[str] = ()) -> str:
    """Describe how a model came about, as a Hugging Face model card."""
    # A path says something about the operator's machine, and nothing to anybody else.
    name = Path(config.model.name).name if Path(config.model.name).is_absolute() else config.model.name
    pattern = getattr(config.train, "parameters", "")
    tuned = f"The parameters with a match of `{pattern}`" if pattern else "The parameters"
    view = RunView.of(ledger.folder)
    sent = sum(one.bytes_up + one.bytes_down for one in view.rounds.values() if one.number <= round)
    nodes = [one for one in view.nodes.values() if 0 < one.first_reply <= round and one.name not in without]
    evaluated = [one for number, one in sorted(view.evaluations.items()) if number <= round and not without]
    rounds = len(view.done)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {name}",
        "tags: [federated-learning, fedtune]",
        "---",
        f"# {Path(config.model.name).name}, tuned by {config.method.name}",
        "",
        f"{tuned} of `{name}` were tuned with FedTune over {counted(round, 'round')} on the data of "
        f"{counted(len(nodes), 'node')}, which did not leave them. "
        f"The nodes and the server exchanged {sent:,} bytes of payload.",
        *(["", f"The run had {rounds} rounds; this is the model after round {round}."] if rounds > round else []),
        *(["", f"What these nodes contributed was left out afterwards: {', '.join(without)}."] if without else []),
        "",
        "| round | held-out loss (nats a token) | perplexity | Rouge-L |",
        "|---|---|---|---|",
        *(_row(one) for one in evaluated[:1] + evaluated[1:][-1:]),
        "",
    ]
    return "\n".join(lines)


def _row(one: Evaluation) -> str:
    rouge = "-" if one.rouge_l is None else f"{one.rouge_l:.3f}"
    return f"| {one.round} | {one.loss:.3f} | {one.perplexity:.2f} | {rouge} |"
