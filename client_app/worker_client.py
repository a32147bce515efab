"""Find, start, replace and ask the worker of this SuperNode.

A worker is bound to one SuperNode process, one FedTune version, one run configuration and one node configuration.
Its folder is under the user's runtime directory, is named after the SuperNode's process and the node, and holds a
lock, the worker's identity (``worker.json``) and its socket: several nodes may run under one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import psutil
from filelock import FileLock

from fedtune_strategies.errors import LinkError, ResourceError
from fedtune_strategies.folders import is_ours, private_runtime_folder, remove_folder

SERVICE, DO, FOLLOW = "fedtune.Worker", "Do", "Follow"
GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SOCKET_PATH_BYTES = 100  # 104 on macOS and 108 on Linux, with the closing zero
PIECE_BYTES = 64 * 2**20  # of a message between messenger and worker: gRPC carries no more than 2 GB at once
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerSpec:
    """All that decides whether a running worker may answer."""

    # Flower's configurations of the run and of the node
    run_config: dict[str, Any]
    node_config: dict[str, Any]
    node_id: int  # Flower's id of the node

    def key(self) -> str:
        """Return a hash of the spec and of the installed FedTune version."""
        text = json.dumps([asdict(self), version("fedtune")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def ask_worker(spec: WorkerSpec, kind: str, payload: bytes, timeout: float, offer: str = "") -> tuple[str, bytes]:
    """Send one task to this SuperNode's worker, starting or replacing it first where it was started for something else.

    A worker that dies on the task is replaced once and asked again: tasks are deterministic. One that does not answer
    in time is ended. An `offer` of a stream is for the worker to keep; empty for none.
    """
    folder = runtime_folder(_host_process(), spec.node_id)
    for attempt in (1, 2):
        with FileLock(folder / "lock"):
            socket = _ensure_worker(folder, spec)
        with grpc.insecure_channel(f"unix:{socket}", options=GRPC_OPTIONS) as channel:
            follow, do = channel.unary_unary(f"/{SERVICE}/{FOLLOW}"), channel.stream_stream(f"/{SERVICE}/{DO}")
            try:
                if offer:
                    follow(offer.encode(), timeout=timeout)
                answer = joined(do(pieces(kind, payload), timeout=timeout))
                break
            except grpc.RpcError as error:
                _stop(folder)
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise LinkError(
                        f"the worker did not answer within {timeout:.0f} s and was ended: raise 'round.deadline'."
                    ) from None
                if attempt == 2:
                    raise LinkError(
                        "the worker died twice on one task: look for 'out of memory' in the system's log and for "
                        f"lines of the worker in the SuperNode's log ({error.details()})."
                    ) from None
    return answer


def pieces(kind: str, payload: bytes) -> Iterator[bytes]:
    """Cut a message, to be `joined` on the other side of the socket."""
    yield kind.encode()
    for start in range(0, len(payload), PIECE_BYTES):
        yield payload[start : start + PIECE_BYTES]


def joined(pieces: Iterator[bytes]) -> tuple[str, bytes]:
    """Return kind and payload of a message that came in `pieces`."""
    return next(pieces, b"").decode(errors="replace"), b"".join(pieces)


def runtime_folder(host: psutil.Process, node_id: int) -> Path:
    """Return the folder of a node's worker, private to the user; made where absent."""
    return private_runtime_folder(f"{host.pid}-{start_of(host.pid)}-{node_id & 0xFFFFFFFF:08x}")  # short, for sockets


def start_of(pid: int) -> int:
    """Return when a process started; on Linux in ticks since the machine did, which no setting of its clock changes.

    Raises `psutil.NoSuchProcess`: there is none of this id.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return int(psutil.Process(pid).create_time())


def running_worker(folder: Path) -> tuple[psutil.Process, str] | None:
    """Return the worker of a runtime folder and its key, None where none runs."""
    try:
        identity = json.loads((folder / "worker.json").read_text())
        process = psutil.Process(identity["pid"])
        return (process, identity["key"]) if start_of(process.pid) == identity["started"] else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def _ensure_worker(folder: Path, spec: WorkerSpec) -> Path:
    socket = folder / f"{spec.key()}.sock"
    if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
        raise ResourceError(f"{socket} is too long for a socket: set XDG_RUNTIME_DIR to a folder with a shorter path.")
    running = running_worker(folder)
    if running is not None and running[1] == spec.key() and _ready(socket, 5.0):
        return socket
    _stop(folder)
    _sweep(folder.parent)
    spec_file = folder / "spec.json"
    spec_file.write_text(json.dumps(asdict(spec)))
    host_pid = folder.name.partition("-")[0]
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "client_app.worker", str(folder), host_pid],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        cwd=folder,
    )
    limit = time.monotonic() + _START_SECONDS
    while time.monotonic() < limit:
        if worker.poll() is not None:
            raise LinkError(
                f"the worker ended while starting (exit code {worker.returncode}): see the SuperNode's log."
            )
        if _ready(socket, 0.2):
            return socket
    worker.kill()
    raise LinkError(f"the worker did not start within {_START_SECONDS:.0f} s: see the SuperNode's log.")


def _sweep(root: Path) -> None:
    """Remove the folders of SuperNodes that are gone: a worker that was ended together with its node left its own.

    Another release of FedTune may name folders otherwise: what counts is that no process has the id any more.
    """
    for folder in root.iterdir():
        pid = folder.name.partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and running_worker(folder) is None and is_ours(folder):
            with contextlib.suppress(OSError, ResourceError):
                remove_folder(folder)


def _ready(socket: Path, seconds: float) -> bool:
    if not socket.exists():
        time.sleep(min(seconds, 0.05))
        return False
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
            return True
        except grpc.FutureTimeoutError:
            return False


def _stop(folder: Path) -> None:
    running = running_worker(folder)
    if running is None:
        return
    process = running[0]
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()


def _host_process() -> psutil.Process:
    """Return the SuperNode above this process, or its executor; outside both, the parent.

    `fedtune join` starts the two beside each other, and the executor ends with its SuperNode.
    """
    ancestors = psutil.Process().parents()
    for process in ancestors:
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()[:4]
            if "deploy.flower.executor" in command or any(Path(part).name == "flower-supernode" for part in command):
                return process
    return ancestors[0]
