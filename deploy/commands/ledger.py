"""``fedtune ledger``: look into the record of a run, check it, and fold it again."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.output import BaseOption, Format, FormatOption, RunArgument, console, show
from deploy.common.units import size
from fedtune_strategies.errors import LedgerError
from fedtune_strategies.words import counted

app = typer.Typer(no_args_is_help=True, help="Look into the record of a run, check it, and fold it again.")

# Facts that `show` prints first where a record has them; the others follow.
_FIRST = ("reason", "message", "train/loss", "loss", "eval/loss")


@app.command()
def verify(run: RunArgument = None, form: FormatOption = Format.text) -> None:
    """Check every record and every file of a run against its hash. Changes nothing; works during the run."""
    from deploy.operator.runs import find_run
    from server_app.ledger import Ledger

    run = find_run(run)
    ledger = Ledger.read(run)
    if found := ledger.damage():
        raise LedgerError(f"{run}: {found}. The next start of the run cuts a damaged end back; or restore a backup.")
    names = {name for _, name in ledger.files()}
    for name in names:
        ledger.check_file(name)
    records = sum(1 for _ in ledger.records())
    line = f"{run}: {counted(records, 'record')} and {counted(len(names), 'file')}, all as they were written"
    show({"run": run, "records": records, "files": len(names)}, form, lambda: console.print(line))


@app.command()
def cut(run: RunArgument = None, form: FormatOption = Format.text) -> None:
    """Go back to the last record before the damage, even if good ones follow it. The damaged file is kept."""
    from deploy.operator.runs import find_run
    from server_app.ledger import Ledger

    run = find_run(run)
    ledger = Ledger(run, cut_anywhere=True)
    newest = ledger.last("cut")
    ledger.close()
    after = newest.body["after"] if newest else None
    last = "nothing is damaged, nothing was cut" if after is None else f"cut back to record {after}"
    show({"run": run, "cut_after": after}, form, lambda: console.print(f"{run}: {last}"))


@app.command()
def prune(run: RunArgument = None, form: FormatOption = Format.text) -> None:
    """Remove what nodes sent in the rounds that are committed, for room on the disk.

    Resuming, exporting the model after any round, and all reports still work; `replay` does not.
    """
    from deploy.operator.runs import find_run
    from server_app.ledger import Ledger

    run = find_run(run)
    ledger = Ledger(run)
    freed = ledger.prune()
    ledger.close()
    line = f"{run}: {size(freed)} freed; it can be resumed and exported, but not replayed any more"
    show({"run": run, "bytes": freed}, form, lambda: console.print(line))


@app.command("show")
def show_records(
    run: RunArgument = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind, such as `reply`, `round` or `refused`.")] = None,
    node: Annotated[str | None, typer.Option(help="Only this node.")] = None,
    round: Annotated[int | None, typer.Option(min=0, help="Only this round.")] = None,
    form: FormatOption = Format.text,
) -> None:
    """List what happened in a run, one line for each record."""
    from deploy.operator.runs import find_run
    from server_app.ledger import Ledger

    records = [
        one
        for one in Ledger.read(find_run(run)).records(*filter(None, [kind]), round=round)
        if node in (None, one.node)
    ]
    facts = [
        {"seq": one.seq, "time": one.time, "kind": one.kind, "round": one.round, "node": one.node, **one.body}
        for one in records
    ]

    def as_text() -> None:
        for one in records:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time))
            first = {key: one.body[key] for key in _FIRST if key in one.body}
            told = " ".join(
                f"{key}={value}" for key, value in (first | one.body).items() if not isinstance(value, dict)
            )
            line = f"{one.seq:6} {at} {one.kind:10} {one.round or '':>4} {one.node:12} {told[:120]}"
            console.print(line.rstrip(), markup=False)

    show(facts, form, as_text)


@app.command()
def replay(
    run: RunArgument = None,
    without: Annotated[list[str] | None, typer.Option(help="A node to leave out; repeat for several.")] = None,
    round: Annotated[int | None, typer.Option(min=1, help="Fold up to this round; the last one by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Export the model into this folder.")] = None,
    model: BaseOption = "",
    form: FormatOption = Format.text,
) -> None:
    """Fold the replies of a run again: check that they make the recorded model, or leave nodes out of it.

    What a node left out had told the others through the weights stays in what they answered: this takes away its own
    contributions, and is not the run that would have been without it.
    """
    from deploy.operator.runs import find_run
    from server_app.replay import replay as fold

    run = find_run(run)
    if without and out is None:
        raise LedgerError("--without makes another model: name a folder for it with --out.")
    done = fold(run, without or (), round, out, model)
    told = f"{counted(done.rounds, 'round')}, {counted(done.kept, 'reply', 'replies')}"
    if without:
        line = f"{out}: the model of {told}, without {done.left_out} of {', '.join(without)}"
    else:
        line = f"{run}: {told} make the recorded model, bit for bit"
    show({"run": run, "model": out, **asdict(done)}, form, lambda: console.print(line))
