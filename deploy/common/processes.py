"""Starting processes so that they are all found and stopped again, even when the one that started them is killed.

Every process of a federation inherits an environment variable with the federation's token, through however many
generations and sessions. So "everything that we started" is a question with an exact answer, and the watchdog
(``deploy/common/watchdog.py``) can still answer it after its launcher was killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from fedtune_strategies.errors import LinkError, PortError

TOKEN = "FEDTUNE_FEDERATION"
LOG_BYTES = 50 * 10**6  # of a log; as much of what was before is kept
PATIENCE = 6.0  # seconds between asking a process to end and killing it


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, follow: bool = False
) -> subprocess.Popen[bytes]:
    """Start a process in its own session, so that a Ctrl-C at the terminal reaches its launcher alone.

    `log` gets stdout and stderr; what it held before is kept once, beside it as ``.previous``. With `follow`, it is
    written behind what another process writes there.
    """
    if log.exists() and not follow:
        log.replace(log.with_suffix(".previous"))
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def rotate(log: Path) -> None:
    """Move what a process has written to ``.previous`` once it is long; the process continues to append."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".previous"))
            os.truncate(log, 0)


def next_pause(pause: float, lived: float) -> float:
    """Seconds to wait before a program is started again: 1, 2, 4 … 60, and 1 again once it lived for a minute."""
    return 1.0 if lived > 60.0 or not pause else min(2 * pause, 60.0)


def stop(processes: Sequence[subprocess.Popen[bytes] | psutil.Process], patience: float = PATIENCE) -> None:
    """Ask processes to end, wait, and kill those that did not."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
    for process in processes:
        with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
            process.wait(1.0)


def marked(token: str) -> list[psutil.Process]:
    """All running processes that carry this federation's token."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sweep(token: str) -> None:
    """Stop every process that carries this token, and those that they start meanwhile."""
    for patience in (1.0, 0.0, 0.0, 0.0):
        if not (left := marked(token)):
            return
        stop(left, patience)


@contextlib.contextmanager
def watchdog(token: str) -> Iterator[None]:
    """Have another process sweep this token as soon as this one has ended, even by kill -9."""
    command = [sys.executable, "-P", "-m", "deploy.common.watchdog", token]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        # Leaving closes its standard input, which is what it waits for, and then waits for it.
        yield


@contextlib.contextmanager
def termination_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, so that what was started is stopped.

    What is ignored stays ignored: with nohup a process outlives its terminal.
    Only the main thread can set signal handlers; in any other this does nothing.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = {}
    with contextlib.suppress(ValueError):
        heeded = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def told_on_ctrl_c(line: str) -> Iterator[None]:
    """Let Ctrl-C end with a line that says what continues without this command."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(line) from None


def free_port() -> int:
    """A port on 127.0.0.1 that nobody uses.

    It is taken below the ranges from which systems number outgoing connections, so that none of those takes it before
    our process does.
    """
    for port in random.sample(range(20_000, 32_000), 500):
        with contextlib.suppress(PortError):
            check_port("127.0.0.1", port)
            return port
    raise PortError("no free port on 127.0.0.1 between 20000 and 32000: end some of the programs that listen there")


def check_port(host: str, port: int) -> None:
    """Raise `PortError` unless this port can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise PortError(
                f"cannot listen on {host}:{port} ({reason}): end what uses it, or choose another"
            ) from error


def answers(port: int) -> bool:
    """Whether somebody listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready: Callable[[], bool], timeout: float, failure: Callable[[], str], pause: float = 0.1) -> None:
    """Wait for a condition; ``failure`` makes the line of the error when ``timeout`` seconds were not enough."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise LinkError(f"{failure()} within {timeout:.0f} s")
        time.sleep(pause)


def tail(log: Path, lines: int = 4) -> str:
    """The last lines of a log file in one line, without colours."""
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        return "(no log)"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    kept = [" ".join(line.split()) for line in plain.splitlines() if line.strip()]
    return " / ".join(kept[-lines:]) or "(empty)"


def environment_path() -> str:
    """PATH with this Python environment's programs first: Flower starts its helpers by bare name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
