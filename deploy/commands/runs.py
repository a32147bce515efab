"""``fedtune run``, ``status``, ``resume`` and ``stop``: an operator's runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deploy.commands.output import (
    Format,
    FormatOption,
    RunArgument,
    SetOption,
    console,
    errors,
    log,
    setting,
    show,
)
from deploy.commands.serve import FolderOption
from deploy.common.paths import server_folder
from fedtune_strategies.config import Scalar
from fedtune_strategies.installed import installed_methods
from fedtune_strategies.run_config import defaults, keys

DetachOption = Annotated[bool, typer.Option("--detach", help="Submit and return; `fedtune status` shows the rest.")]


def run(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(installed_methods())}.")] = "",
    model: Annotated[str, typer.Option(help="Base model: folder, Hub id, or the embedded `fedtune-tiny`.")] = "",
    held_out: Annotated[
        Path | None, typer.Option("--eval", help="Your held-out examples, in any format that nodes may use.")
    ] = None,
    data_format: Annotated[str, typer.Option("--data-format", help="Format of the held-out file.")] = "auto",
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    min_nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that must be there before a round.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with keys of the run configuration.", exists=True)
    ] = None,
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one in `~/.fedtune/runs`.")] = None,
    detach: DetachOption = False,
    folder: FolderOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Tune a model over the nodes that have joined: check first, submit, follow to the end.

    A run that dies is submitted again and continues from its record. Ctrl-C stops following, not the run:
    `fedtune status` shows it, `fedtune stop` stops it, `fedtune resume` continues it.
    """
    from deploy.operator.runs import new_folder
    from deploy.operator.serve import running

    control, _ = running(folder or server_folder())
    given: dict[str, Scalar | None] = {
        "method.name": method or None,
        "model.name": model or None,
        "eval.data": str(held_out) if held_out else None,
        "eval.format": data_format if held_out else None,
        "num-server-rounds": rounds,
        "strategy.min-nodes": min_nodes,
        "run.dir": str(out) if out else None,
    }
    settings: dict[str, Scalar] = _from_file(config) | dict(map(setting, changes or []))
    settings |= {key: value for key, value in given.items() if value is not None}
    settings.setdefault("method.name", defaults()["method.name"])
    settings.setdefault("run.dir", str(new_folder(str(settings["method.name"]))))
    settings = _with_absolute_paths(settings)
    settings.setdefault("round.first-nodes", list(control.node_states().values()).count("online"))
    _preflight(control, settings)
    _tune(control, settings, detach, form)


def resume(
    run: RunArgument = None, detach: DetachOption = False, folder: FolderOption = None, form: FormatOption = Format.text
) -> None:
    """Go on with a run where it was, to the same result: it was stopped, it died, or its server was away."""
    from deploy.operator.runs import find_run, settings_of
    from deploy.operator.serve import running

    control, _ = running(folder or server_folder())
    found = find_run(run)
    _tune(control, settings_of(found) | {"run.dir": str(found.resolve())}, detach, form)


def stop(run: RunArgument = None, folder: FolderOption = None, form: FormatOption = Format.text) -> None:
    """Stop a run. What it has done is kept; `fedtune resume` continues it."""
    from deploy.operator.runs import find_run
    from deploy.operator.runs import stop as stop_run
    from deploy.operator.serve import running

    control, _ = running(folder or server_folder())
    found = find_run(run)
    stop_run(control, found)
    line = f"Stopped {found}; `fedtune resume {found}` continues it"
    show({"folder": found, "state": "stopped"}, form, lambda: console.print(line, markup=False))


def runs(
    most: Annotated[int, typer.Option("--most", min=1, help="So many, the newest first.")] = 20,
    form: FormatOption = Format.text,
) -> None:
    """List the runs on this machine, the newest first. Other commands take a run by its name, or the newest."""
    from deploy.common.paths import newest_runs, runs_folder
    from deploy.status.report import report
    from server_app.run_view import RunView

    views = [RunView(folder) for folder in newest_runs(runs_folder(), most)]
    for view in views:
        view.follow()
    found = [_brief(report(view)) for view in views]
    show(found, form, lambda: _print_runs(found))


def status(
    run: RunArgument = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Stay, and show it as it changes, until Ctrl-C.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the status page to this file instead; of a folder of runs, all of them side by side."),
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Show how a run stands: rounds, losses, who is alive, bytes, what went wrong, how long it will take.

    Reads the run's record alone; needs no server, disturbs no run.
    """
    from deploy.common.paths import newest_runs
    from deploy.common.processes import told_on_ctrl_c
    from deploy.operator.runs import find_run
    from deploy.operator.watch import Screen
    from deploy.status.page import write_page
    from deploy.status.report import report
    from server_app.run_view import RunView

    if html is not None:
        write_page(run if run is not None and newest_runs(run) else find_run(run), html)
        show({"page": html}, form, lambda: console.print(f"Wrote {html}", markup=False))
        return
    view = RunView.of(find_run(run))
    if not watch:
        show(report(view), form, lambda: _print_screen(view))
        return
    with told_on_ctrl_c("the run continues"), Live(Screen(view), console=console, auto_refresh=False) as live:
        while view.end is None:
            time.sleep(0.5)
            view.update()
            live.update(Screen(view), refresh=True)
    _print_model(view)


def _print_screen(view: Any) -> None:
    from deploy.operator.watch import Screen

    console.print(Screen(view), soft_wrap=False)
    _print_model(view)


def _print_model(view: Any) -> None:
    if view.end and (model := view.end.body.get("model")):
        console.print(f"The tuned model: {model} (round {view.end.body.get('kept')})", markup=False)


def _brief(report: dict[str, Any]) -> dict[str, Any]:
    """What the list of runs says of one."""
    kept = {key: report["run"][key] for key in ("name", "method", "model", "state", "round", "rounds", "started")}
    losses = [one["loss"] for one in report["evaluations"] if one["loss"] is not None]
    return kept | {"loss_before": losses[0] if losses else None, "loss": losses[-1] if len(losses) > 1 else None}


def _print_runs(found: list[dict[str, Any]]) -> None:
    table = Table("run", "method", "state", "rounds", "held-out loss", box=None, header_style="bold", pad_edge=False)
    for one in found:
        loss = " → ".join(f"{loss:.3f}" for loss in (one["loss_before"], one["loss"]) if loss is not None) or "-"
        rounds = f"{one['round']}/{one['rounds']}"
        table.add_row(escape(one["name"]), escape(one["method"]), one["state"], rounds, loss)
    console.print(table if found else "No run yet: `fedtune run` starts one", soft_wrap=False)


def _tune(control: Any, settings: dict[str, Scalar], detach: bool, form: Format) -> None:
    from deploy.operator.runs import submit, tune
    from deploy.operator.watch import Lines, Screen
    from deploy.status.report import report
    from fedtune_strategies.errors import LedgerError
    from server_app.run_view import RunView

    folder = settings["run.dir"]
    if detach:
        facts = {"run_id": submit(control, settings), "folder": folder}
        show(facts, form, lambda: console.print(f"Submitted; its record: {folder}. See `fedtune status`", markup=False))
        return
    view = RunView(Path(str(folder)))
    if form is Format.text and console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            tune(control, settings, view, lambda view: live.update(Screen(view), refresh=True), log)
    else:
        news = Lines()

        def tell(view: RunView) -> None:
            for line in news(view):
                log(line)

        with contextlib.suppress(LedgerError):  # of a run that is resumed, what happened before is no news
            view.update()
            news(view)
        tune(control, settings, view, tell, log)
    show(report(view), form, lambda: _print_model(view))


def _preflight(control: Any, settings: dict[str, Scalar]) -> None:
    """Check what can be checked here before anybody is asked to work; raises the first error."""
    from deploy.common.checks import show_checks
    from fedtune_strategies.errors import error_from_code

    if failed := show_checks(_checks(control, settings), errors):
        raise error_from_code(failed[0].exit_code, f"{failed[0].label}: {failed[0].detail}")


def _checks(control: Any, settings: dict[str, Scalar]) -> Iterator[Any]:
    from deploy.common.checks import check
    from deploy.operator.preflight import held_out_data, in_time, room, run_folder, run_model, who_is_there, with_config

    config = check("settings", lambda: with_config(settings))
    yield config
    if config.ok:
        yield check("model", lambda: run_model(settings))
        yield check("held-out", lambda: held_out_data(settings))
        yield check("folder", lambda: run_folder(settings))
        yield check("disk", lambda: room(settings))
        yield check("time", lambda: in_time(settings))
    yield check("nodes", lambda: who_is_there(control, settings))


def _with_absolute_paths(settings: dict[str, Scalar]) -> dict[str, Scalar]:
    """Make the paths of a run's settings absolute: the ServerApp starts elsewhere."""
    method = str(settings["method.name"])
    paths = {key.name for key in keys(method, settings) if key.path and settings.get(key.name)}
    if Path(str(settings.get("model.name", ""))).expanduser().is_dir():  # else it is the name of a model
        paths.add("model.name")
    return settings | {key: str(Path(str(settings[key])).expanduser().resolve()) for key in paths & set(settings)}


def _from_file(file: Path | None) -> dict[str, Scalar]:
    import tomllib

    from fedtune_strategies.errors import ConfigError

    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML ({error})") from None
    return _flat(table)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Scalar]:
    pairs: dict[str, Scalar] = {}
    for key, value in table.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs
