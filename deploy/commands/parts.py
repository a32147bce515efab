"""``fedtune parts``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from deploy.commands.output import Format, FormatOption, SetOption, console, setting, show


def parts(
    model: Annotated[str, typer.Argument(help="A model folder, a Hub id that is in the cache, or fedtune-tiny.")],
    method: Annotated[str, typer.Option(help="A method that trains a part of the model at a time.")],
    changes: SetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """List the parts of a model that a method trains one at a time, with their sizes; no weights are loaded.

    For example `fedtune parts MODEL --method fedcybgd --set fedcybgd.layers-per-block=2`.
    """
    from fedtune_strategies.errors import ConfigError
    from fedtune_strategies.language.base import structure
    from fedtune_strategies.language.model_files import model_folder
    from fedtune_strategies.method import load_method
    from fedtune_strategies.run_config import parse

    list_parts = load_method(method).parts
    if list_parts is None:
        raise ConfigError(f"the method '{method}' trains the model as a whole: it has no parts.")
    config = parse(dict(map(setting, changes or [])) | {"method.name": method})
    found = list_parts(config, structure(model_folder(model)))
    facts = [
        {"part": index, "name": name, "parameters": count, "frozen": frozen}
        for index, (name, count, frozen) in enumerate(found)
    ]
    show(facts, form, lambda: _print(facts))


def _print(facts: list[dict[str, object]]) -> None:
    table = Table("part", "name", "parameters", "", box=None, header_style="bold", pad_edge=False)
    table.columns[2].justify = "right"
    for row in facts:
        table.add_row(str(row["part"]), str(row["name"]), f"{row['parameters']:,}", "frozen" if row["frozen"] else "")
    console.print(table)
