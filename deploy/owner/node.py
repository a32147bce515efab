"""A device owner's node: a SuperNode that is kept running, and what its log means in plain words."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from client_app.history import LEFT, History, Row
from client_app.stats import VARIABLE
from deploy.common import processes
from deploy.common.flower_cli import flower_environment
from deploy.common.units import size
from deploy.flower.commands import Runtime
from deploy.owner.join import Membership
from fedtune_strategies.config.node import node_settings
from fedtune_strategies.errors import ConfigError, LinkError
from fedtune_strategies.protocol.door import clean
from fedtune_strategies.stream.offer import STREAM_ADDRESS

LOOK_EVERY = 0.5
STEPS_EVERY = 10.0  # seconds between two lines about a task's steps
STILL_ASKED = 3600.0  # seconds for which a run that was refused while nobody looked is told of

# What SuperNode and tasks log, and what that means; \\1 is what the pattern's group found.
MEANINGS = [
    (r"SuperNode ID: (\d+)", "connected"),
    (r"Connection attempt failed, retrying in ([\d.]+)", "the server cannot be reached; trying again"),
    (r"Connection successful after", "connected again"),
    (r"ConfigError: (refused an app .*)", r"\1"),
    (r"Exit Code: 305", "the server refuses this node; trying again (see `fedtune doctor`)"),
]


def run_node(
    membership: Membership, on_event: Callable[[str], None], on_waiting: Callable[[Row], None] = lambda run: None
) -> None:
    """Run a node until it leaves or the caller is interrupted; what ends is started again, with pauses that grow.

    `on_event` gets a line when something changed, `on_waiting` a run that was refused as wider than its owner agreed
    to.
    """
    folder = membership.folder
    token = secrets.token_hex(16)
    environment = {
        **flower_environment(folder),
        STREAM_ADDRESS: membership.address,
        VARIABLE: str(folder / "facts.json"),
        processes.TOKEN: token,
    }
    look = _watcher(membership, on_event, on_waiting)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / "node.lock", timeout=0))
        except Timeout:
            raise LinkError(
                f"node {membership.name} runs already, perhaps as a service: it needs no second one"
            ) from None
        stack.enter_context(processes.termination_as_exit())
        stack.enter_context(processes.watchdog(token))
        stack.callback(processes.sweep, token)
        log = folder / "logs" / "supernode.log"
        log.parent.mkdir(exist_ok=True)
        pause = 0.0
        while True:
            started = time.monotonic()
            runtime = Runtime(folder / "runtime", processes.free_port())
            code = _run_once(membership, runtime, environment, log, on_event, look)
            if not membership.file.exists():
                on_event(f"left: this machine is no member of {membership.address} any more")
                return
            pause = processes.next_pause(pause, time.monotonic() - started)
            on_event(f"the SuperNode ended with code {code}; starting it again in {pause:.0f} s")
            time.sleep(pause)


def node_config_words(membership: Membership) -> str:
    """A membership's node configuration in Flower's notation."""
    given = node_settings(membership.node_config())
    settings = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in given.items()}
    if quoted := [value for value in settings.values() if '"' in value]:
        raise ConfigError(f"{quoted[0]}: Flower takes no path with a quote in it: move it")
    return " ".join(f'{key}="{value}"' for key, value in settings.items())


def _watcher(
    membership: Membership, on_event: Callable[[str], None], on_waiting: Callable[[Row], None]
) -> Callable[[], bool]:
    """Make a function that tells what the worker wrote down, and says whether the node is still a member."""
    history, facts = History(membership.folder), membership.folder / "facts.json"
    told, stepped, last_step = time.time() - STILL_ASKED, time.monotonic(), ""
    seen = len(history.rows())

    def look() -> bool:
        nonlocal told, stepped, last_step, seen
        rows = history.rows()
        for line in filter(None, map(what_left, rows[seen:])):
            on_event(line)
        seen = len(rows)
        waiting = history.waiting()
        if waiting and waiting["time"] > told:
            told = waiting["time"]
            on_waiting(waiting)
        if time.monotonic() - stepped > STEPS_EVERY:
            stepped = time.monotonic()
            with contextlib.suppress(OSError, ValueError, KeyError):
                now = json.loads(facts.read_text())
                step = f"step {now['step']} of {now['steps']}"
                if step != last_step:  # a worker that was killed left it
                    on_event(step)
                last_step = step
        return membership.file.exists()

    return look


def _run_once(
    membership: Membership,
    runtime: Runtime,
    environment: dict[str, str],
    log: Path,
    on_event: Callable[[str], None],
    look: Callable[[], bool],
) -> int:
    words = node_config_words(membership)
    command = runtime.supernode(membership.address, membership.authority, membership.key, words)
    process = processes.start(command, environment, log)
    executor: subprocess.Popen[bytes] | None = None
    last, start = "", 0
    while True:
        code = process.poll()
        processes.rotate(log)
        text, start = _grown(log, start)
        for meaning in meanings(text):
            if meaning != last:
                on_event(meaning)
            last = meaning
        if code is not None:
            return code
        if not look():
            processes.stop([one for one in (executor, process) if one])
            return 0
        # Whoever took the port meanwhile lacks the certificate: the executor talks to this SuperNode alone.
        if (executor is None or executor.poll() is not None) and processes.answers(runtime.port):
            executor = processes.start(runtime.executor(process.pid), environment, log, follow=True)
        time.sleep(LOOK_EVERY)


def what_left(row: Row) -> str:
    """Say in a line what left this machine; nothing of what tells nothing of the data and comes with every run."""
    if row["event"] != LEFT:
        return ""
    if row["result"]:
        return f"round {row['round']}: worked, and replied with {size(row['bytes'])}"
    said = {
        "hello-reply": f"takes part in {row['run'] or 'a run'}",
        "failure": "a task failed: the operator was told why",
    }
    return said.get(row["kind"], "")


def meanings(text: str) -> list[str]:
    """Say what lines of a SuperNode's log mean; lines that mean nothing to an owner are left out."""
    found = [(re.search(pattern, line), meaning) for line in text.splitlines() for pattern, meaning in MEANINGS]
    return [clean(match.expand(meaning)) for match, meaning in found if match]


def _grown(log: Path, start: int) -> tuple[str, int]:
    with log.open("rb") as stream:
        start = start if start <= log.stat().st_size else 0  # it was rotated
        stream.seek(start)
        data = stream.read()
    whole = data.rpartition(b"\n")[0]
    return whole.decode(errors="replace"), start + len(whole) + (1 if whole else 0)
