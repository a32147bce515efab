"""An operator's server: SuperLink, executor, the published port and the desk behind it; what dies is restarted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from deploy.common import processes
from deploy.common.address import split_address
from deploy.common.certificates import ServerFiles, server_files
from deploy.common.flower_cli import CONTROL_TOKEN, Control, flower_environment, write_connection
from deploy.common.join_token import JoinToken, authority_hash
from deploy.common.paths import private_folder, write_json
from deploy.flower import commands
from deploy.flower.commands import make_secret
from deploy.flower.strangers import check_closed
from deploy.operator.alpn_router import CONNECTIONS, Front, room_for
from deploy.operator.announcement import read_announcement
from deploy.operator.members import Members
from deploy.operator.registration import RegistrationServer
from fedtune_strategies.errors import LinkError, PortError
from fedtune_strategies.folders import MEMBERS_FILE, private_runtime_folder
from fedtune_strategies.stream.offer import STREAM_ADDRESS, STREAM_FOLDER

START_TIMEOUT = 180.0  # seconds; a SuperLink needs about 5, on a busy machine many times that


@dataclass
class Service:
    """One program that is kept running."""

    name: str  # for people, and of the log file
    command: list[str]  # the program
    port: int = 0  # port of 127.0.0.1 on which it answers; 0 for none
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0


@dataclass
class Server:
    """A running server; made by `serving`."""

    address: str  # ``host:port`` at which nodes find it
    control: Control  # the SuperLink
    members: Members  # who may take part
    authority: Path  # the certificate that nodes trust
    services: list[Service]
    front: Front
    on_event: Callable[[str], None]
    _due: dict[str, float] = field(default_factory=dict)

    def invite(self, name: str, lifetime: float) -> str:
        """Make a join token."""
        return invite(self.members, self.authority, self.address, name, lifetime)

    def watch(self) -> None:
        """Restart what has ended, after a pause that grows while it keeps ending."""
        for service in self.services:
            assert service.process is not None
            log = self.control.folder / "logs" / f"{service.name}.log"
            processes.rotate(log)
            if service.process.poll() is None:
                continue
            if service.name not in self._due:
                service.pause = processes.next_pause(service.pause, time.monotonic() - service.started)
                self._due[service.name] = time.monotonic() + service.pause
                code = service.process.returncode
                self.on_event(f"{service.name} ended with code {code}, starting it again ({processes.tail(log, 2)})")
            elif time.monotonic() >= self._due[service.name]:
                del self._due[service.name]
                _start(service, self.control)


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    address: str,
    listen: str,
    approval: bool = False,
    connections: int = CONNECTIONS,
    on_event: Callable[[str], None] = lambda line: None,
) -> Iterator[Server]:
    """Run a server until the block is left; then stop all that was started, also after kill -9.

    What is in the folder is used again: keys, members, runs that Flower knows. `address` is where nodes reach the
    published port; it goes into the certificate and into tokens. A node has one connection, and one more while it works
    over a stream.
    """
    host, port = split_address(address)
    folder = private_folder(folder.resolve())
    token = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        _take(stack, folder)
        processes.check_port(listen, port)
        if (room := room_for(connections)) < connections:
            on_event(f"room for {room} connections, not {connections}: raise the limit of open files (`ulimit -n`)")
        files = server_files(folder / "keys", [host])
        streams = private_runtime_folder(f"streams-{hashlib.sha256(bytes(folder)).hexdigest()[:16]}")
        place = {STREAM_FOLDER: str(streams), STREAM_ADDRESS: address}
        place[MEMBERS_FILE] = str(folder / "members.json")  # ServerApps call nodes by it, never by what a node says
        environment = {**flower_environment(folder), **place, processes.TOKEN: token}
        control = Control(folder, environment)
        members = Members(folder)
        stack.enter_context(processes.termination_as_exit())
        stack.enter_context(processes.watchdog(token))
        stack.callback(processes.sweep, token)
        control_port, fleet_port = _distinct_ports()
        control_token = make_secret(folder / CONTROL_TOKEN)
        write_connection(folder, control_port, files.authority, control_token)
        services = _services(folder, files, control_token, control_port, fleet_port)
        (folder / "logs").mkdir(exist_ok=True)
        for service in services:
            _start(service, control)
            _wait(service, folder)
        check_closed(control_port, fleet_port, files.authority)
        desk = RegistrationServer(
            files, members, control, offer=lambda: read_announcement(folder), approval=approval, on_event=on_event
        )
        desk.reconcile()
        front = stack.enter_context(_open(desk, fleet_port, streams, listen, port, on_event, room))
        write_json(folder / "serve.json", {"address": address, "pid": os.getpid(), "control": control_port})
        stack.callback((folder / "serve.json").unlink, missing_ok=True)
        yield Server(address, control, members, files.authority, services, front, on_event)


def running(folder: Path) -> tuple[Control, str]:
    """Find the server that runs on a folder, and the address at which nodes reach it."""
    try:
        facts = json.loads((folder / "serve.json").read_text())
        alive = psutil.pid_exists(facts["pid"]) and processes.answers(facts["control"])
    except (OSError, ValueError, KeyError):
        alive = False
    if not alive:
        raise LinkError(f"no server runs on {folder}: start one with `fedtune serve`, in its own terminal")
    return Control(folder, flower_environment(folder)), facts["address"]


def invite(members: Members, authority: Path, address: str, name: str, lifetime: float) -> str:
    """Make a join token for a name."""
    secret, expires = members.invite(name, lifetime)
    return JoinToken(address, name, authority_hash(authority.read_text()), secret, expires).encode()


def _take(stack: contextlib.ExitStack, folder: Path) -> None:
    try:
        stack.enter_context(FileLock(folder / "serve.lock", timeout=0))
    except Timeout:
        raise LinkError(f"a server runs on {folder} already: `fedtune nodes` and `fedtune run` use it") from None


def _distinct_ports() -> tuple[int, int]:
    one, other = processes.free_port(), processes.free_port()
    return (one, other) if one != other else _distinct_ports()


def _services(folder: Path, files: ServerFiles, token: Path, control: int, fleet: int) -> list[Service]:
    secret = make_secret(folder / "executor.secret")
    superlink = commands.superlink(
        files, token, secret, control=control, fleet=fleet, more=["--database", str(folder / "superlink.db")]
    )
    executor = commands.executor(control, files.authority, secret, os.getpid())
    return [Service("superlink", superlink, control), Service("executor", executor)]


def _start(service: Service, control: Control) -> None:
    log = control.folder / "logs" / f"{service.name}.log"
    service.process = processes.start(service.command, control.environment, log)
    service.started = time.monotonic()


def _wait(service: Service, folder: Path) -> None:
    log, process = folder / "logs" / f"{service.name}.log", service.process
    assert process is not None
    processes.wait_until(
        lambda: process.poll() is not None or not service.port or processes.answers(service.port),
        START_TIMEOUT,
        lambda: f"the {service.name} did not answer; its log {log} ends: {processes.tail(log)}",
    )
    if process.poll() is not None:
        raise LinkError(
            f"the {service.name} ended with code {process.poll()}; its log {log} ends: {processes.tail(log)}"
        )


@contextlib.contextmanager
def _open(
    desk: RegistrationServer,
    fleet: int,
    streams: Path,
    listen: str,
    port: int,
    on_event: Callable[[str], None],
    connections: int,
) -> Iterator[Front]:
    """Run desk and front in an event loop in its own thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front", daemon=True)
    thread.start()

    def call(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30.0)

    front = Front(fleet, call(desk.open()), streams, on_event, connections)
    try:
        try:
            call(front.open(listen, port))
        except OSError as error:
            raise PortError(f"cannot listen on {listen}:{port} ({error.strerror}): choose another --address") from error
        yield front
    finally:
        call(front.close())
        call(desk.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
