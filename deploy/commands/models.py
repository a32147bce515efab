"""``fedtune export`` and ``fedtune eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.output import BaseOption, Format, FormatOption, RunArgument, console, show

# What `eval` prints: label, fact, number format.
FIGURES = [
    ("held-out loss", "eval/loss", ".4f"),
    ("perplexity", "eval/perplexity", ".2f"),
    ("Rouge-L", "eval/rougeL", ".3f"),
    ("examples", "examples", ","),
    ("tokens", "tokens", ","),
]


def export(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    run: RunArgument = None,
    round: Annotated[
        int | None, typer.Option(min=0, help="The round; the last one by default, 0 for the base model.")
    ] = None,
    model: BaseOption = "",
    form: FormatOption = Format.text,
) -> None:
    """Write the model after any round of a run as a Hugging Face folder, also during the run."""
    from deploy.operator.runs import find_run
    from server_app.export import export_round

    done = export_round(find_run(run), round, out, model)
    show({"model": out, "round": done}, form, lambda: typer.echo(f"{out}: the model after round {done}"))


def evaluate(
    data: Annotated[Path, typer.Option(help="Held-out examples, in any format that nodes may use.", exists=True)],
    run: RunArgument = None,
    model: Annotated[
        str, typer.Option(help="A model folder or Hub id instead of a run; with RUN, where its base model is.")
    ] = "",
    round: Annotated[int | None, typer.Option(min=0, help="The round; the last one by default.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Examples answered for Rouge-L; 0 for none.")] = 64,
    seq_length: Annotated[int, typer.Option(min=8, help="Longest sequence in tokens.")] = 256,
    data_format: Annotated[str, typer.Option("--data-format", help="Format of the data.")] = "auto",
    form: FormatOption = Format.text,
) -> None:
    """Measure loss, perplexity and Rouge-L of a run after any round, or of any model, on a file of yours."""
    import tempfile

    from deploy.operator.runs import find_run
    from fedtune_strategies.errors import ConfigError

    if model and round is not None and not run:
        raise ConfigError("--round is of a run: name the run too")
    settings = {"eval.data": str(data), "eval.format": data_format, "eval.answers": answers}
    settings["train.seq-length"] = seq_length
    with tempfile.TemporaryDirectory() as folder:
        if run or not model:
            from server_app.export import export_round

            export_round(find_run(run), round, Path(folder) / "model", model)
            model = str(Path(folder) / "model")
        facts = _evaluated(model, settings)
    del facts["answers"]

    def as_text() -> None:
        for label, name, form in FIGURES:
            if name in facts:
                console.print(f"{label:18}{facts[name]:{form}}")

    show(facts, form, as_text)


def _evaluated(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    from fedtune_strategies.language.model import load_model
    from fedtune_strategies.run_config import parse
    from server_app.evaluation import evaluate as measure
    from server_app.evaluation import load_held_out

    config = parse(settings)
    language = load_model(model, config.model.dtype)
    held_out = load_held_out(config, language)
    assert held_out is not None
    return {"answers": []} | measure(language, held_out, config, with_answers=True)
