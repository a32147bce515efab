"""A whole federation on one machine: SuperLink and SuperNodes as processes of their own, with TLS and node keys.

It is what an operator and device owners would type (docs/operations.md), each in its process, and nothing else: the
same Flower programs, the same connections; only the byte counters stand between.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deploy.common import processes
from deploy.common.certificates import ServerFiles, node_key, server_files
from deploy.common.flower_cli import Control, flower_environment, write_connection
from deploy.local.proxy import ByteProxy, Traffic
from fedtune_strategies.errors import ConfigError, LinkError, NodesError, PortError

# Seconds. A SuperLink needs about 4, four nodes on two cores about 10; a busy machine, many times that.
START_TIMEOUT = 180.0
PORT_ATTEMPTS = 3


@dataclass(frozen=True)
class Federation(Control):
    """A running federation; made by `federation`.

    Attributes
    ----------
    folder : Path
        State: keys, Flower's home with the connection, log files.
    environment : dict of str
        The environment for Flower's commands.
    superlink : subprocess.Popen
        The SuperLink.
    nodes : dict of str to subprocess.Popen
        The SuperNodes by name.
    node_ids : dict of str to int
        The SuperNodes' ids in messages and in the ledger, by name.
    proxy : ByteProxy
        Counts the nodes' bytes.
    """

    superlink: subprocess.Popen[bytes]
    nodes: dict[str, subprocess.Popen[bytes]]
    node_ids: dict[str, int]
    proxy: ByteProxy

    def alive(self) -> list[str]:
        """Names of the nodes whose process runs."""
        return [name for name, process in self.nodes.items() if process.poll() is None]

    def traffic(self) -> dict[str, Traffic]:
        """Bytes that each node's connection has carried since the start."""
        return self.proxy.snapshot()

    def log(self, name: str) -> Path:
        """Log file of a node, or of the SuperLink under the name ``superlink``."""
        return _log(self.folder, name)

    def check(self) -> None:
        """Raise `LinkError` if the SuperLink has ended, and `NodesError` if all nodes have."""
        if (code := self.superlink.poll()) is not None:
            raise LinkError(_ended("the SuperLink", code, self.log("superlink")))
        if not self.alive():
            name, process = next(iter(self.nodes.items()))
            raise NodesError("no node is left: " + _ended(f"node {name}", process.poll(), self.log(name)))


@contextlib.contextmanager
def federation(
    folder: Path,
    data: Mapping[str, Path],
    *,
    fleet_port: int = 0,
    threads: int = 1,
    bandwidth: float = math.inf,
) -> Iterator[Federation]:
    """Start a SuperLink and SuperNodes, wait until all are online, and stop everything when left.

    All of it is stopped on every way out: the end of the block, an error, Ctrl-C, SIGTERM, SIGHUP and, by a watchdog
    process, kill -9 of this process.

    Parameters
    ----------
    folder : Path
        State of the federation. Keys and certificates that lie there are used again.
    data : mapping of str to Path
        Data file of each node by the node's name.
    fleet_port : int
        Port for the nodes; 0 takes a free one.
    threads : int
        Threads of numerical libraries in each node's processes.
    bandwidth : float
        Bytes a second of each node's connection, in either direction.

    Yields
    ------
    Federation
        With every node online.

    Raises
    ------
    PortError
        The fleet port is in use.
    LinkError
        A process ended while it started, or was not ready in time; the line quotes the end of its log.
    """
    _check_names(data)
    folder = folder.resolve()
    token = secrets.token_hex(16)
    environment = _environment(folder, token, threads)
    server = server_files(folder / "keys")
    (folder / "logs").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.termination_as_exit())
        stack.enter_context(processes.watchdog(token))
        stack.callback(processes.sweep, token)
        superlink, control, fleet = _start_superlink(folder, server, environment, fleet_port)
        write_connection(folder, control, server.authority)
        proxy = stack.enter_context(ByteProxy("127.0.0.1", fleet, list(data), bandwidth))
        node_ids = _register(Control(folder, environment), list(data))
        nodes = _start_nodes(folder, data, server, environment, proxy)
        stack.callback(processes.stop, list(nodes.values()))
        running = Federation(folder, environment, superlink, nodes, node_ids, proxy)
        _wait_online(running)
        yield running


def _check_names(data: Mapping[str, Path]) -> None:
    if not data:
        raise NodesError("a federation needs at least one node: name its data file")
    for name, file in data.items():
        if '"' in f"{name}{file}" or name in {"superlink", "", ".", ".."} or "/" in name:
            raise ConfigError(f"node {name!r} with data {str(file)!r}: choose a plain name, and a path without quotes")


def _environment(folder: Path, token: str, threads: int) -> dict[str, str]:
    # Nodes that share a machine share its cores: numerical threads beyond that fight each other.
    limits = {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    return {**flower_environment(folder), **limits, processes.TOKEN: token}


def _start_superlink(
    folder: Path, server: ServerFiles, environment: dict[str, str], fleet_port: int
) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start the SuperLink; returns it with its control port and its fleet port."""
    log = _log(folder, "superlink")
    if fleet_port:
        processes.check_port("127.0.0.1", fleet_port)
    for _ in range(PORT_ATTEMPTS):
        control, fleet = processes.free_port(), fleet_port or processes.free_port()
        superlink = processes.start(_superlink_command(server, control, fleet), environment, log)
        if _listens(superlink, control, "the SuperLink", log):
            return superlink, control, fleet
    raise PortError(
        f"the SuperLink found its ports taken {PORT_ATTEMPTS} times; its log {log} ends: {processes.tail(log)}"
    )


def _superlink_command(server: ServerFiles, control: int, fleet: int) -> list[str]:
    return [
        "flower-superlink",
        *("--ssl-ca-certfile", str(server.authority)),
        *("--ssl-certfile", str(server.certificate)),
        *("--ssl-keyfile", str(server.key)),
        "--enable-supernode-auth",
        *("--fleet-api-type", "grpc-rere"),
        *("--fleet-api-address", f"127.0.0.1:{fleet}"),
        # Control and runtime: whoever reaches this port can run code on all nodes.
        *("--host", "127.0.0.1", "--port", str(control)),
        "--disable-runtime-dependency-installation",
    ]


def _start_nodes(
    folder: Path, data: Mapping[str, Path], server: ServerFiles, environment: dict[str, str], proxy: ByteProxy
) -> dict[str, subprocess.Popen[bytes]]:
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    waiting = list(data)
    for _ in range(PORT_ATTEMPTS):
        ports = {name: processes.free_port() for name in waiting}
        for name, port in ports.items():
            command = _node_command(folder, name, data[name], server, proxy.address(name), port)
            nodes[name] = processes.start(command, environment, _log(folder, name))
        waiting = [
            name for name, port in ports.items() if not _listens(nodes[name], port, f"node {name}", _log(folder, name))
        ]
        if not waiting:
            return nodes
    raise PortError(f"nodes {', '.join(waiting)} found their ports taken {PORT_ATTEMPTS} times: try again")


def _node_command(folder: Path, name: str, data: Path, server: ServerFiles, superlink: str, port: int) -> list[str]:
    return [
        "flower-supernode",
        "--grpc-rere",
        *("--superlink", superlink),
        *("--root-certificates", str(server.authority)),
        *("--auth-supernode-private-key", str(node_key(folder / "keys", name).private)),
        *("--node-config", f'name="{name}" data="{data.resolve()}"'),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def _listens(process: subprocess.Popen[bytes], port: int, what: str, log: Path) -> bool:
    """Wait until a process listens on its port; False when somebody else took that port first."""
    processes.wait_until(
        lambda: process.poll() is not None or processes.answers(port),
        START_TIMEOUT,
        lambda: f"{what} did not listen on port {port}; its log {log} ends: {processes.tail(log)}",
    )
    code = process.poll()
    if code is not None and "in use" not in processes.tail(log, 20):
        raise LinkError(_ended(what, code, log))
    return code is None


def _register(control: Control, names: Sequence[str]) -> dict[str, int]:
    """Make the nodes' keys known to the SuperLink; returns the nodes' ids."""

    def register(name: str) -> int:
        return control.register(node_key(control.folder / "keys", name).public, name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(register, names), strict=True))


def _wait_online(running: Federation) -> None:
    def missing() -> list[str]:
        states = running.node_states()
        return [name for name, node_id in running.node_ids.items() if states.get(node_id) != "online"]

    def online() -> bool:
        for name, process in running.nodes.items():
            if (code := process.poll()) is not None:
                raise LinkError(_ended(f"node {name}", code, running.log(name)))
        return not missing()

    def failure() -> str:
        names = missing()
        log = running.log(names[0]) if names else running.log("superlink")
        return f"nodes not online: {', '.join(names)}; the log {log} ends: {processes.tail(log)}"

    processes.wait_until(online, START_TIMEOUT, failure)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _ended(what: str, code: int | None, log: Path) -> str:
    return f"{what} ended with exit code {code}; its log {log} ends: {processes.tail(log)}"
