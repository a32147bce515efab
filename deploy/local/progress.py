"""Following a run while it goes on: what its ledger says, who is alive, what the connections carry."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from deploy.common.flower_cli import RunStatus
from deploy.common.units import clock, size
from deploy.local.federation import Federation
from deploy.local.proxy import Traffic
from fedtune_strategies.errors import LedgerError, RunError, error_from_code
from server_app.ledger import Ledger, Record

LOOK_EVERY = 0.5  # seconds between two looks at the ledger
NOTHING = Traffic()
# Seconds between two questions to the SuperLink, which cost over a second of one core. The ledger tells almost all.
ASK_EVERY = 60.0


@dataclass
class Progress:
    """What is known of a run so far."""

    method: str
    rounds: int
    nodes: int
    started: float
    alive: int = 0
    round: int = 0
    train_loss: float | None = None
    held_out_loss: float | None = None
    traffic: Traffic = NOTHING
    first_round_at: float = 0.0
    last_round_at: float = 0.0
    phase: str = "starting"
    ended: Record | None = None

    def take(self, record: Record) -> str | None:
        """Take up a record of the ledger; returns a line worth printing, if it makes one."""
        if record.kind == "round":
            self.round, self.last_round_at = record.round, record.time
            self.first_round_at = self.first_round_at or record.time
            self.train_loss = record.body["metrics"].get("train/loss", self.train_loss)
        elif record.kind == "evaluation":
            self.held_out_loss = record.body["eval/loss"]
            self.phase = f"round {record.round}/{self.rounds}" if record.round else "nodes joining"
            return self.line()
        elif record.kind == "asked":
            self.phase = f"round {record.round}/{self.rounds}"
        elif record.kind in ("refused", "lost"):
            return f"{record.node or 'a node'}: {record.body['reason']}"
        elif record.kind in ("finished", "failed"):
            self.ended = record
        return None

    def seconds_left(self) -> float | None:
        """Estimate from the pace of the rounds so far; None before the second round."""
        if self.round < 2:
            return None
        pace = (self.last_round_at - self.first_round_at) / (self.round - 1)
        return max(0.0, pace * (self.rounds - self.round) - (time.time() - self.last_round_at))

    def place(self) -> str:
        """Where the run stands, and for how long."""
        left = self.seconds_left()
        return f"{self.phase}, " + (
            f"{clock(left)} left" if left is not None else f"{clock(time.time() - self.started)} gone"
        )

    def facts(self) -> str:
        """What has been measured so far."""
        losses = [("loss", self.train_loss), ("held-out", self.held_out_loss)]
        return ", ".join(
            [
                *(f"{label} {loss:.3f}" for label, loss in losses if loss is not None),
                f"{self.alive}/{self.nodes} nodes",
                f"up {size(self.traffic.up)}",
                f"down {size(self.traffic.down)}",
            ]
        )

    def line(self) -> str:
        """Everything in one line of plain text."""
        return f"{self.method:13} {self.place()}, {self.facts()}"

    def __rich__(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            f"[bold]{self.method}[/bold]", ProgressBar(total=self.rounds, completed=self.round, width=30), self.place()
        )
        shown = Table.grid()
        shown.add_row(grid)
        shown.add_row(self.facts())
        return shown


def follow(running: Federation, run_id: int, folder: Path, progress: Progress, console: Console) -> None:
    """Show a run's progress until it has ended: one live line on a terminal, a line for each round elsewhere.

    Raises
    ------
    FedTuneError
        The run failed; the error that the ServerApp recorded, where it recorded one.
    """
    start = running.traffic()
    seen = 0
    asked = time.monotonic()
    live = Live(progress, console=console, transient=True, refresh_per_second=4) if console.is_terminal else None
    with live or contextlib.nullcontext():
        status = RunStatus("pending", "")
        while not status.finished:
            running.check()
            # Asked before the ledger is read, so that what is read after a run's end is all of it.
            if progress.ended or time.monotonic() - asked > ASK_EVERY:
                status = running.status(run_id)
                asked = time.monotonic()
            progress.alive = len(running.alive())
            progress.traffic = _grown(start, running.traffic())
            for record in _records(folder, seen):
                seen = record.seq
                line = progress.take(record)
                if line and (live is None or record.kind != "evaluation"):
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            time.sleep(LOOK_EVERY)
    _raise_failure(running, run_id, status, progress.ended)


def _grown(before: dict[str, Traffic], now: dict[str, Traffic]) -> Traffic:
    return sum((now[node] - before[node] for node in now), Traffic())


def _records(folder: Path, after: int) -> list[Record]:
    # Until the ServerApp has made its ledger there is nothing to read.
    with contextlib.suppress(LedgerError):
        ledger = Ledger.read(folder)
        try:
            return list(ledger.records(after=after))
        finally:
            ledger.close()
    return []


def _raise_failure(running: Federation, run_id: int, status: RunStatus, ended: Record | None) -> None:
    if status.completed:
        return
    if ended and ended.kind == "failed":
        raise error_from_code(ended.body["exit_code"], ended.body["message"])
    lines = [line for line in running.run_log(run_id).splitlines() if line.strip()]
    raise RunError(f"run {run_id} ended as {status.state} ({status.details}); its log ends: {' / '.join(lines[-3:])}")
