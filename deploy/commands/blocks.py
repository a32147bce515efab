"""``fedtune blocks``."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.output import Format, FormatOption, SetOption, console, setting, show


def blocks(
    model: Annotated[str, typer.Argument(help="A model folder, a Hub id that is in the cache, or fedtune-tiny.")],
    set: SetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """List the blocks that FedCyBGD would train in a model, with their sizes; no weights are loaded.

    For example `fedtune blocks MODEL --set fedcybgd.layers-per-block=2`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedtune_strategies.blocks.cut import cut_model
    from fedtune_strategies.blocks.find import block_sizes, blocks_table
    from fedtune_strategies.blocks.held import empty_model
    from fedtune_strategies.config import parse
    from fedtune_strategies.language.model_files import model_folder

    run = parse(dict(setting(text) for text in set or []))
    config = AutoConfig.from_pretrained(model_folder(model), local_files_only=True, trust_remote_code=False)
    empty = empty_model(lambda: AutoModelForCausalLM.from_config(config))
    found = cut_model(empty, run)
    sizes = dict(block_sizes(empty, found))
    facts = [
        {"block": block.index, "name": block.name, "parameters": sizes[block.index], "frozen": block.frozen}
        for block in found
    ]
    show(facts, form, lambda: console.print(blocks_table(empty, found)))
