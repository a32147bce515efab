"""From a run's ledger to the one JSON document that the page, the metrics and ``fedtune status`` show.

Nothing is asked of the run: the ledger is read while the run writes it, and every figure below is a fold over its rows.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch

from fedtune_strategies.config import defaults, parse
from fedtune_strategies.errors import FedTuneError, LedgerError
from fedtune_strategies.method import load_method
from server_app.ledger import Ledger, Record

FORMAT = 1
# A document stays small however long a run is and however many nodes it has.
MAX_POINTS = 400  # rounds in a chart; of longer runs every n-th
MAX_NODES = 200
MAX_TURNS = 60  # rounds in the timeline, the newest,
MAX_CELLS = 1500  # and fewer of a large fleet
MAX_ANSWERS = 8
MAX_NOTES = 40

ENDS = ("finished", "failed", "stopped")
"""Kinds of records with which a run ends, until it is started again; also its state."""
ALIVE = ("working", "present")


def report(folder: Path) -> dict[str, Any]:
    """Read a run, finished or going on.

    Parameters
    ----------
    folder : Path
        The run's folder, ``run.dir``.

    Returns
    -------
    dict
        Ready for JSON: ``run`` (method, model, state, round, times), ``totals``, ``rounds``, ``evaluations``,
        ``nodes``, ``turns`` (what each node did in the newest rounds), ``panel`` (what the method shows, or None),
        ``answers`` (before and after) and ``notes`` (refusals and losses). Bytes are payload, without Flower's
        envelope; times are seconds since the epoch, durations seconds.

    Raises
    ------
    LedgerError
        There is no ledger, or it cannot be read.
    """
    view = RunView(folder)
    view.update()
    return view.report()


class RunView:
    """A run's ledger, folded row by row; following a run reads only what is new.

    Parameters
    ----------
    folder : Path
        The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable = ""
        self._told: tuple[tuple[int, str], dict[str, Any]] | None = None
        self._clear()

    def update(self) -> bool:
        """Take up what was written since; returns whether there was anything.

        Raises
        ------
        LedgerError
            There is no ledger, or it cannot be read.
        """
        with contextlib.closing(Ledger.read(self.folder)) as ledger:
            records = ledger.records(after=max(0, self.seq - 1))
            if self.seq and getattr(next(records, None), "time", None) != self._last:
                # The ledger was cut back and went on differently.
                self._clear()
                records = ledger.records()
            before, newest = self.seq, None
            for record in records:
                self._take(record)
                newest = record if record.kind == "round" else newest
            if newest is not None:
                self._state = ledger.payload(newest)
            return self.seq != before

    def follow(self) -> bool:
        """As `update`; a ledger that cannot be read is a state of this run, and no error for those beside it."""
        before = self.unreadable
        try:
            changed, self.unreadable = self.update(), ""
        except LedgerError as error:
            changed, self.unreadable = False, str(error)
        return changed or self.unreadable != before

    def report(self) -> dict[str, Any]:
        """Return the document, see `report`; it is made again only after something was written."""
        known = self.seq, self.unreadable
        if self._told is None or self._told[0] != known:
            self._told = known, self._report()
        return self._told[1]

    def _report(self) -> dict[str, Any]:
        evaluations = list(self.evaluations.values())
        rounds = [*self.summaries, *(self._round(number) for number in sorted(self.rounds))]
        return _finite(
            {
                "format": FORMAT,
                "run": self._run(rounds),
                "totals": self._totals(rounds),
                "rounds": _thinned(rounds),
                "evaluations": _thinned([{k: v for k, v in one.items() if k != "answers"} for one in evaluations]),
                "nodes": self._node_rows(),
                "turns": self._turns(),
                "panel": _panel(self.config, self._state),
                "answers": _answers(evaluations),
                "notes": self.notes[-MAX_NOTES:][::-1],
            }
        )

    def rounds_after(self, number: int) -> list[dict[str, Any]]:
        """Return all rounds behind one, in order: of a long run the report has only some."""
        return [*self.summaries[number:], *(self._round(one) for one in sorted(self.rounds) if one > number)]

    # The fold

    def _clear(self) -> None:
        self.seq = 0
        self._last: float | None = None
        self._state = b""
        self.config: dict[str, Any] = {}
        self.begun = False
        self.stopped = 0.0  # seconds between a last record and the next start
        self.starts: list[dict[str, Any]] = []
        self.end: Record | None = None
        self.rounds: dict[int, dict[str, Any]] = {}
        self.summaries: list[dict[str, Any]] = []
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.notes: list[dict[str, Any]] = []

    def _take(self, record: Record) -> None:
        body = record.body
        match record.kind:
            case "submitted":
                self.config, self.end, self.begun = body.get("config", {}), None, False
            case "start":
                self._start(record)
            case "asked":
                one = self._open_round(record)
                # After a stop the nodes that had not answered are asked once more, and their time counts from then.
                kept = set(one["asked"] if body.get("again") else one["replies"])
                one["asked"] |= {name: record.time for name in body["nodes"] if name not in kept}
            case "reply":
                self._reply(record)
            case "acknowledged":
                self._open_round(record)["acknowledged"].append({"node": record.node, **body})
                self._count(record)
            case "round":
                self._open_round(record).update(committed=record.time, metrics=body.get("metrics", {}))
                self._forget_details(record.round - MAX_TURNS)
            case "evaluation":
                self.evaluations[record.round] = _evaluation(record)
            case "joined" | "lost" | "refused" | "late" | "cut":
                self._note(record)
            case kind if kind in ENDS:
                self.end = record
        self.seq, self._last = record.seq, record.time

    def _start(self, record: Record) -> None:
        self.config, self.end, self.begun = record.body.get("config", {}), None, True
        pause = record.time - self._last if self._last and self.starts else 0.0
        self.stopped += pause
        for one in self.rounds.values():
            if not one["committed"]:
                one["stopped"] += pause
        self.starts.append({"time": record.time, **{k: v for k, v in record.body.items() if k != "config"}})

    def _open_round(self, record: Record) -> dict[str, Any]:
        times: dict[str, Any] = {"began": record.time, "committed": None, "stopped": 0.0}
        seen: dict[str, Any] = {"asked": {}, "replies": {}, "refused": {}, "acknowledged": [], "metrics": {}}
        return self.rounds.setdefault(record.round, times | seen)

    def _forget_details(self, number: int) -> None:
        """Of a round that the timeline no longer shows, keep the sums alone: runs may be long and fleets large."""
        if number in self.rounds:
            self.summaries.append(self._round(number))
            del self.rounds[number]

    def _node(self, record: Record) -> dict[str, Any]:
        totals = {"replies": 0, "refused": 0, "examples": 0, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
        newest = {"loss": None, "peak_memory": 0, "fingerprint": "", "way": "", "last_seen": record.time}
        node = self.nodes.setdefault(record.node, {"name": record.node, **totals, **newest})
        node["event"] = record.kind
        if record.kind != "lost":
            node["last_seen"] = record.time
        return node

    def _reply(self, record: Record) -> None:
        body = record.body
        self._open_round(record)["replies"][record.node] = {"time": record.time, **body}
        node = self._count(record)
        node["replies"] += 1
        node["examples"] = body.get("num_examples", node["examples"])
        node["peak_memory"] = max(node["peak_memory"], body.get("peak_memory", 0))
        node |= {key: body[key] for key in ("loss", "fingerprint", "way") if key in body}

    def _count(self, record: Record) -> dict[str, Any]:
        node = self._node(record)
        for key in ("bytes_up", "bytes_down", "seconds"):
            node[key] += record.body.get(key, 0)
        return node

    def _note(self, record: Record) -> None:
        reason = record.body.get("reason", "")
        if record.node:
            node = self._node(record)
            if record.kind == "refused":
                node["refused"] += 1
                if record.round:
                    self._open_round(record)["refused"][record.node] = reason
        if record.kind != "joined":
            facts = {"time": record.time, "kind": record.kind, "round": record.round, "node": record.node}
            self.notes.append(facts | {"reason": reason})

    # The document

    def _run(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        standard, start = _standard(self.config), self.starts[-1] if self.starts else {}
        total = self.config.get("num-server-rounds", 0)
        committed = [one["committed"] for one in rounds if one["committed"]]
        end = self.end
        return {
            "name": self.folder.resolve().name,
            "method": self.config.get("method.name", ""),
            "model": self.config.get("model.name", ""),
            "version": start.get("version", ""),
            "run_id": start.get("run_id", ""),
            "state": "unreadable" if self.unreadable else end.kind if end else "running",
            "message": self.unreadable or (end.body.get("message", "") if end else ""),
            "exit_code": end.body.get("exit_code") if end else None,
            "exported": end.body.get("model", "") if end else "",
            "phase": "" if end else self._phase(len(committed), total),
            "kept": end.body.get("kept") if end else None,
            "round": len(committed),
            "rounds": total,
            "started": self.starts[0]["time"] if self.starts else None,
            "restarts": max(0, len(self.starts) - 1),
            "updated": self._last,
            "seconds": self._last - self.starts[0]["time"] - self.stopped if self.starts and self._last else 0.0,
            "seconds_left": None if end else self._seconds_left(committed, total),
            "settings": {k: v for k, v in sorted(self.config.items()) if standard.get(k) != v},
        }

    def _phase(self, done: int, total: int) -> str:
        """Say what a run that has not ended does."""
        if not self.begun:
            return "starting"
        if (one := self.rounds.get(done + 1)) and one["asked"]:
            return f"{len(one['replies'])} of {len(one['asked'])} replied"
        measured = self.config.get("eval.data") and (done == total or done % self.config.get("eval.every", 1) == 0)
        if measured and done not in self.evaluations:
            return "measuring the model"
        present = sum(node["event"] not in ("lost", "refused") for node in self.nodes.values())
        needed = self.config.get("strategy.min-nodes", 1)
        if done < total and present < needed:
            return f"waiting for nodes: {present} of {needed} there"
        return "asking the nodes" if done < total else "writing the model"

    def _seconds_left(self, committed: list[float], total: int) -> float | None:
        """Estimate from the pace of the newest rounds of this start; None before the first."""
        began = self.starts[-1]["time"] if self.starts else 0.0
        times = [at for at in committed if at > began][-20:]
        if len(times) == 1:  # the one round since this start, if all of it was
            times = [one["began"] for one in self.rounds.values() if one["committed"] and one["began"] > began] + times
        if len(times) < 2:
            return None
        return (total - len(committed)) * (times[-1] - times[0]) / (len(times) - 1)

    def _totals(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("waiting", "aggregation", "evaluation")
        states = [node["state"] for node in self._states()]
        return {
            "bytes_up": sum(node["bytes_up"] for node in self.nodes.values()),
            "bytes_down": sum(node["bytes_down"] for node in self.nodes.values()),
            "replies": sum(node["replies"] for node in self.nodes.values()),
            "refused": sum(node["refused"] for node in self.nodes.values()),
            "nodes": len(self.nodes),
            "nodes_alive": sum(state in ALIVE for state in states),
            "peak_memory": max((node["peak_memory"] for node in self.nodes.values()), default=0),
            "seconds": {name: sum(one["seconds"][name] or 0.0 for one in rounds) for name in names},
        }

    def _round(self, number: int) -> dict[str, Any]:
        one, replies = self.rounds[number], list(self.rounds[number]["replies"].values())
        messages = [*replies, *one["acknowledged"]]
        return {
            "round": number,
            "began": one["began"],
            "committed": one["committed"],
            "train_loss": one["metrics"].get("train/loss"),
            "metrics": one["metrics"],
            "asked": len(one["asked"]),
            "replies": len(replies),
            "refused": len(one["refused"]),
            "bytes_up": sum(message.get("bytes_up", 0) for message in messages),
            "bytes_down": sum(message.get("bytes_down", 0) for message in messages),
            "slowest": max((reply.get("seconds", 0.0) for reply in replies), default=None),
            "seconds": self._phases(number),
            "fingerprints": sorted({reply["fingerprint"] for reply in replies if "fingerprint" in reply}),
        }

    def _phases(self, number: int) -> dict[str, float | None]:
        """Split a round: until its last reply, until it was committed, and the evaluation that followed."""
        one = self.rounds[number]
        answered = max((reply["time"] for reply in one["replies"].values()), default=None)
        aggregation = None
        # A server that was stopped between the two committed later: that is no work.
        if answered and one["committed"] and not self._restarted(answered, one["committed"]):
            aggregation = one["committed"] - answered
        return {
            "waiting": max(0.0, answered - one["began"] - one["stopped"]) if answered else None,
            "aggregation": aggregation,
            "evaluation": self.evaluations.get(number, {}).get("seconds"),
        }

    def _restarted(self, after: float, before: float) -> bool:
        return any(after < start["time"] < before for start in self.starts)

    def _node_rows(self) -> list[dict[str, Any]]:
        rows = sorted(self._states(), key=lambda node: node["name"])[:MAX_NODES]
        return [{key: value for key, value in row.items() if key != "event"} for row in rows]

    def _states(self) -> list[dict[str, Any]]:
        newest = self.rounds[max(self.rounds)] if self.rounds else None
        return [node | {"state": _state(node, newest)} for node in self.nodes.values()]

    def _turns(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        for number in sorted(self.rounds, reverse=True)[:MAX_TURNS]:
            if turns and len(turns) + len(self.rounds[number]["asked"]) > MAX_CELLS:
                break
            turns = _round_turns(number, self.rounds[number]) + turns
        return turns


def _standard(config: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(FedTuneError):  # a method that is not installed here
        return dict(defaults(str(config.get("method.name", "")), config))
    return {}


def _state(node: dict[str, Any], newest: dict[str, Any] | None) -> str:
    """Say how a node stands: lost, refused, working, silent (asked and never answered) or present."""
    name = node["name"]
    if node["event"] in ("lost", "refused"):
        return str(node["event"])
    if newest and name in newest["asked"] and name not in newest["replies"]:
        if not newest["committed"]:
            return "working"
        return "present" if name in _acknowledged(newest) else "silent"
    return "present"


def _acknowledged(one: dict[str, Any]) -> set[str]:
    return {message["node"] for message in one["acknowledged"]}


def _round_turns(number: int, one: dict[str, Any]) -> list[dict[str, Any]]:
    turns = []
    for name, began in one["asked"].items():
        reply = one["replies"].get(name, {})
        state = "replied" if reply else "refused" if name in one["refused"] else "none"
        if state == "none" and not one["committed"]:
            state = "working"
        if state == "none" and name in _acknowledged(one):
            continue  # it got what it needs for its next turn, and had none in this round
        facts = {key: reply[key] for key in ("block", "loss") if key in reply}
        seconds = {"seconds": round(reply["time"] - began, 2)} if reply else {}
        turns.append({"round": number, "node": name, "state": state} | seconds | facts)
    return turns


def _panel(config: dict[str, Any], state: bytes) -> dict[str, Any] | None:
    """Ask the run's method what it shows; None where it shows nothing, or the run is of another release."""
    try:
        shown = (
            load_method(config["method.name"]).panel(parse(config), safetensors.torch.load(state)) if state else None
        )
    except (FedTuneError, KeyError):
        return None
    return None if shown is None else asdict(shown)


def _evaluation(record: Record) -> dict[str, Any]:
    body = record.body
    return {
        "round": record.round,
        "time": record.time,
        "loss": body.get("eval/loss"),
        "perplexity": body.get("eval/perplexity"),
        "rouge_l": body.get("eval/rougeL"),
        "seconds": body.get("seconds"),
        "fingerprint": body.get("fingerprint", ""),
        "answers": body.get("answers", []),
    }


def _answers(evaluations: list[dict[str, Any]]) -> list[dict[str, str | None]]:
    answered = [one for one in evaluations if one["answers"]]
    if not answered:
        return []
    first, last = answered[0], answered[-1]
    after = {one["prompt"]: one["answer"] for one in last["answers"]} if last is not first else {}
    return [
        {
            "prompt": one["prompt"],
            "expected": one["reference"].strip(),
            "before": one["answer"],
            "after": after.get(one["prompt"]),
        }
        for one in first["answers"][:MAX_ANSWERS]
    ]


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep at most `MAX_POINTS`, evenly, the newest among them."""
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-1][::stride][::-1]


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def newest_runs(folder: Path, count: int = 12) -> list[Path]:
    """List the runs in a folder, the newest first; a run's own folder is its only run.

    Parameters
    ----------
    folder : Path
        A run, or a folder of runs.
    count : int
        Most runs to list.
    """
    if (folder / "ledger.sqlite").exists():
        return [folder]
    ledgers = sorted(folder.glob("*/ledger.sqlite"), key=_touched, reverse=True)
    return [ledger.parent for ledger in ledgers[:count]]


def _touched(ledger: Path) -> float:
    """Return when a ledger was written last: its log tells while it is open. An empty log is a mere reader's."""
    times = [0.0]
    for path in (ledger, ledger.with_name("ledger.sqlite-wal")):
        with contextlib.suppress(OSError):
            facts = path.stat()
            times += [facts.st_mtime] * (facts.st_size > 0)
    return max(times)
