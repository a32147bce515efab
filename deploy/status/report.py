"""A run as one JSON document, which the page, the metrics and ``fedtune status`` show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import safetensors.numpy

from fedtune_strategies.errors import FedTuneError
from fedtune_strategies.method import load_method
from fedtune_strategies.run_config import defaults, parse
from server_app.ledger import Ledger
from server_app.run_view import TURNS, Evaluation, NodeView, Round, RunView, Turn

FORMAT = 1
# A document stays small however long a run is and however many nodes it has.
MAX_POINTS = 400  # rounds in a chart; of longer runs every n-th
MAX_NODES = 200
MAX_CELLS = 1500  # turns in the timeline
MAX_ANSWERS = 8
MAX_NOTES = 40
ASKING = "asking the nodes"  # a phase of an instant


def report(view: RunView) -> dict[str, Any]:
    """Make the document of a run, finished or not.

    Returns: ready for JSON: ``run`` (method, model, state, round, times), ``totals``, ``rounds``, ``evaluations``,
        ``nodes``, ``turns`` (what each node did in the newest rounds), ``panel`` (what the method shows, or None),
        ``answers`` (before and after) and ``notes`` (refusals and losses). Bytes are payload, without Flower's
        envelope; times are seconds since the epoch, durations seconds.
    """
    evaluations = list(view.evaluations.values())
    states = _states(view)
    return _finite(
        {
            "format": FORMAT,
            "run": _run(view),
            "totals": _totals(view, states),
            "rounds": [_round(view, one) for one in _thinned([*view.rounds.values()])],
            "evaluations": [_without(asdict(one), "answers") for one in _thinned(evaluations)],
            "nodes": [
                _without(asdict(view.nodes[name]), "event", "first_reply")
                | {"state": states[name], "step": view.steps.get(name)}
                for name in sorted(states)[:MAX_NODES]
            ],
            "turns": _turns(view),
            "panel": _panel(view),
            "answers": _answers(evaluations),
            "notes": view.notes[-MAX_NOTES:][::-1],
        }
    )


def _run(view: RunView) -> dict[str, Any]:
    standard, start = _standard(view.config), view.starts[-1] if view.starts else {}
    end, began = view.end, view.starts[0]["time"] if view.starts else None
    return {
        "name": view.folder.resolve().name,
        "method": view.config.get("method.name", ""),
        "model": view.config.get("model.name", ""),
        "version": start.get("version", ""),
        "run_id": start.get("run_id", ""),
        "state": "unreadable" if view.unreadable else end.kind if end else "running",
        "message": view.unreadable or (end.body.get("message", "") if end else ""),
        "exit_code": end.body.get("exit_code") if end else None,
        "exported": end.body.get("model", "") if end else "",
        "phase": phase(view),
        "kept": end.body.get("kept") if end else None,
        "round": len(view.done),
        "rounds": view.config.get("num-server-rounds", 0),
        "started": began,
        "restarts": max(0, len(view.starts) - 1),
        "updated": view.updated or None,
        "seconds": 0.0 if began is None else view.updated - began - view.stopped,
        "seconds_left": _seconds_left(view),
        "settings": {k: v for k, v in sorted(view.config.items()) if standard.get(k) != v},
    }


def phase(view: RunView) -> str:
    """Say what a run that has not ended does; empty where it has."""
    done, total = len(view.done), view.config.get("num-server-rounds", 0)
    if view.end:
        return ""
    if not view.begun:
        return "starting"
    if (one := view.rounds.get(done + 1)) and one.asked:
        replied = f"{one.replies} of {one.asked} replied"
        if view.measured and done not in view.evaluations:  # replies are taken when the last round's model is measured
            return f"{replied}, measuring {'{}/{}'.format(*view.measured)}"
        slowest = min(view.steps.values(), key=lambda far: far[0] / far[1], default=None)
        return f"{replied}, step {slowest[0]}/{slowest[1]}" if slowest else replied
    if done < total:
        if not view.loaded:
            return "loading the model"
        present = sum(node.event not in ("lost", "refused") for node in view.nodes.values())
        needed = view.config.get("strategy.min-nodes", 1)
        return f"waiting for nodes: {present} of {needed} there" if present < needed else ASKING
    measured = done in view.evaluations or not view.config.get("eval.data")
    if measured:
        return "writing the model"
    return "measuring the model" + (", {}/{}".format(*view.measured) if view.measured else "")


def _seconds_left(view: RunView) -> float | None:
    """Estimate from the pace of the newest rounds of this start; None before the first."""
    began = view.starts[-1]["time"] if view.starts else 0.0
    done = [one for one in view.done if one.committed > began]
    times = [one.committed for one in done[-20:]]
    if len(times) == 1:  # the one round since this start, if all of it was
        times = [one.began for one in done if one.began > began] + times
    if view.end or len(times) < 2:
        return None
    left = view.config.get("num-server-rounds", 0) - len(view.done)
    return float(left * (times[-1] - times[0]) / (len(times) - 1))


def _totals(view: RunView, states: dict[str, str]) -> dict[str, Any]:
    nodes = view.nodes.values()
    phases = [_phases(view, one) for one in view.rounds.values()]
    return {
        **{key: sum(getattr(one, key) for one in nodes) for key in ("bytes_up", "bytes_down", "replies", "refused")},
        "nodes": len(nodes),
        "nodes_alive": sum(state in ("working", "present") for state in states.values()),
        "peak_memory": max((node.peak_memory for node in nodes), default=0),
        "seconds": {name: sum(one[name] or 0.0 for one in phases) for name in _PHASES},
    }


_PHASES = ("waiting", "aggregation", "evaluation")


def _phases(view: RunView, one: Round) -> dict[str, float | None]:
    """Split a round: until its last reply, until it was committed, and the evaluation that followed."""
    evaluated = view.evaluations.get(one.number)
    seconds = (one.waiting, one.aggregation, evaluated.seconds if evaluated else None)
    return dict(zip(_PHASES, seconds, strict=True))


def _round(view: RunView, one: Round) -> dict[str, Any]:
    kept = ("began", "asked", "replies", "refused", "bytes_up", "bytes_down", "slowest", "metrics")
    return {key: getattr(one, key) for key in kept} | {
        "round": one.number,
        "committed": one.committed or None,
        "train_loss": one.train_loss,
        "seconds": _phases(view, one),
        "fingerprints": sorted(one.fingerprints),
    }


def _states(view: RunView) -> dict[str, str]:
    newest = view.rounds[max(view.rounds)] if view.rounds else None
    return {name: _state(node, newest) for name, node in view.nodes.items()}


def _state(node: NodeView, newest: Round | None) -> str:
    """Say how a node stands: lost, refused, working, silent (asked and never answered) or present."""
    if node.event in ("lost", "refused"):
        return node.event
    turn = newest.turns.get(node.name) if newest else None
    if newest and turn and turn.asked and not turn.replied:
        if not newest.committed:
            return "working"
        return "present" if turn.acknowledged else "silent"
    return "present"


def _turns(view: RunView) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for number in sorted(view.rounds, reverse=True)[:TURNS]:
        one = view.rounds[number]
        if shown and len(shown) + len(one.turns) > MAX_CELLS:
            break
        cells = [_cell(one, name, turn) for name, turn in one.turns.items() if turn.asked]
        # Who acknowledged got what it needs for its next turn, and had none in this round.
        shown = [cell for cell in cells if cell["state"] != "acknowledged"] + shown
    return shown


def _cell(one: Round, name: str, turn: Turn) -> dict[str, Any]:
    waited = {"seconds": round(turn.replied - turn.asked, 2)} if turn.replied else {}
    if turn.replied:
        state = "replied"
    elif turn.refused:
        state = "refused"
    elif not one.committed:
        state = "working"
    else:
        state = "acknowledged" if turn.acknowledged else "none"
    return {"round": one.number, "node": name, "state": state} | waited | turn.facts


def _standard(config: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(FedTuneError):  # a method that is not installed here
        return dict(defaults(str(config.get("method.name", "")), config))
    return {}


def _panel(view: RunView) -> dict[str, Any] | None:
    """Ask the run's method what it shows; None where it shows nothing, or the run is of another release."""
    try:
        panel = load_method(view.config["method.name"]).panel
        if panel is None or view.newest is None:
            return None
        with contextlib.closing(Ledger.read(view.folder)) as ledger:
            state = ledger.payload(view.newest)
        shown = panel(parse(view.config), safetensors.numpy.load(state)) if state else None
    except (FedTuneError, KeyError):
        return None
    return None if shown is None else asdict(shown)


def _answers(evaluations: Sequence[Evaluation]) -> list[dict[str, str | None]]:
    answered = [one for one in evaluations if one.answers]
    if not answered:
        return []
    first, last = answered[0], answered[-1]
    after = {one["prompt"]: one["answer"] for one in last.answers} if last is not first else {}
    return [
        {
            "prompt": one["prompt"],
            "expected": one["reference"].strip(),
            "before": one["answer"],
            "after": after.get(one["prompt"]),
        }
        for one in first.answers[:MAX_ANSWERS]
    ]


def _thinned(points: list[Any]) -> list[Any]:
    """Keep at most `MAX_POINTS`, evenly, the newest among them."""
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-1][::stride][::-1]


def _without(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in names}


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value
