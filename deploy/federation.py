"""A whole federation on one machine: SuperLink and SuperNodes as processes of their own, with TLS and node keys.

It is what an operator and device owners would type (docs/operations.md), each in its process, and nothing else: the
same Flower programs, the same connections; only the byte counters stand between.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import processes
from deploy.certificates import ServerFiles, node_key, server_files
from deploy.proxy import ByteProxy, Traffic
from fedtune_strategies.errors import ConfigError, FedTuneError, LinkError, NodesError, PortError, RunError

CONNECTION = "fedtune"
# Seconds. A SuperLink needs about 4, four nodes on two cores about 10, a command 2; a busy machine, many times that.
START_TIMEOUT = 180.0
COMMAND_TIMEOUT = 180.0
PORT_ATTEMPTS = 3


@dataclass(frozen=True)
class RunStatus:
    """What the SuperLink says about a run."""

    state: str  # pending, starting, running, finished:completed, finished:failed or finished:stopped
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run has ended, in whatever way."""
        return self.state.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether the run has ended as it should."""
        return self.state == "finished:completed"


@dataclass(frozen=True)
class Federation:
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

    folder: Path
    environment: dict[str, str]
    superlink: subprocess.Popen[bytes]
    nodes: dict[str, subprocess.Popen[bytes]]
    node_ids: dict[str, int]
    proxy: ByteProxy

    def submit(self, app: Path, run_config: Mapping[str, str | int | float | bool]) -> int:
        """Submit a run with ``flwr run`` and return its id.

        Parameters
        ----------
        app : Path
            Folder with the app's ``pyproject.toml``.
        run_config : mapping
            Keys that differ from the app's own configuration.

        Raises
        ------
        ConfigError
            Flower refused the app or a key.
        """
        overrides = self.folder / "run.toml"
        # Strings, numbers and booleans are written alike in JSON and TOML.
        overrides.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in run_config.items()))
        command = ["run", str(app), CONNECTION, "--run-config", str(overrides)]
        return int(_flwr(command, self.environment, ConfigError)["run-id"])

    def status(self, run_id: int) -> RunStatus:
        """Ask the SuperLink about a run (about a second of one core: ask seldom)."""
        runs = _flwr(["ls", CONNECTION, "--run-id", str(run_id)], self.environment, LinkError)["runs"]
        return RunStatus(runs[0]["status"], runs[0]["status-details"])

    def stop_run(self, run_id: int) -> None:
        """Stop a run; messages that nodes are working on still end there."""
        _flwr(["stop", str(run_id), CONNECTION], self.environment, RunError)

    def run_log(self, run_id: int) -> str:
        """What the run's ServerApp has written so far."""
        command = ["flwr", "log", str(run_id), CONNECTION, "--show"]
        return _call(command, self.environment).stdout

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
    folder: Path, data: Mapping[str, Path], *, fleet_port: int = 0, threads: int = 1
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
        _write_connection(folder, control, server)
        proxy = stack.enter_context(ByteProxy("127.0.0.1", fleet, list(data)))
        node_ids = _register(folder, list(data), environment)
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
    loopback = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost,127.0.0.1,::1"]))
    return {
        **os.environ,
        processes.TOKEN: token,
        "PATH": processes.environment_path(),
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Seconds between looks for a task to start. Flower's own pace is one second; a quicker one than this costs more
        # in polling than it saves (at 0.05 s, five idle executors and what they ask take 0.4 of a core).
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        # Nodes that share a machine share its cores: numerical threads beyond that fight each other.
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


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


def _write_connection(folder: Path, control: int, server: ServerFiles) -> None:
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{control}"\n'
        f"root-certificates = {json.dumps(str(server.authority))}\n"
    )


def _register(folder: Path, names: Sequence[str], environment: dict[str, str]) -> dict[str, int]:
    """Make the nodes' keys known to the SuperLink; returns the nodes' ids."""

    def register(name: str) -> int:
        public = node_key(folder / "keys", name).public
        answer = _flwr(["supernode", "register", str(public), CONNECTION, "--name", name], environment, LinkError)
        return int(answer["node-id"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(register, names), strict=True))


def _wait_online(running: Federation) -> None:
    def online() -> bool:
        for name, process in running.nodes.items():
            if (code := process.poll()) is not None:
                raise LinkError(_ended(f"node {name}", code, running.log(name)))
        return set(running.node_ids.values()) <= _online(running.environment)

    def failure() -> str:
        missing = set(running.node_ids.values()) - _online(running.environment)
        names = [name for name, node_id in running.node_ids.items() if node_id in missing]
        log = running.log(names[0]) if names else running.log("superlink")
        return f"nodes not online: {', '.join(names)}; the log {log} ends: {processes.tail(log)}"

    processes.wait_until(online, START_TIMEOUT, failure)


def _online(environment: dict[str, str]) -> set[int]:
    nodes = _flwr(["supernode", "list", CONNECTION], environment, LinkError)["nodes"]
    return {int(node["node-id"]) for node in nodes if node["status"] == "online"}


def _flwr(arguments: Sequence[str], environment: dict[str, str], error: type[FedTuneError]) -> dict[str, Any]:
    """Call ``flwr … --format json`` and return its answer; its exit code says nothing, ``success`` does."""
    done = _call(["flwr", *arguments, "--format", "json"], environment)
    answer: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        answer, _ = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{"))
    if not answer.get("success"):
        reason = answer.get("error-message") or done.stderr or done.stdout or f"exit code {done.returncode}"
        raise error(f"flwr {arguments[0]} failed: {' '.join(str(reason).split())}")
    return answer


def _call(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT)
    except FileNotFoundError as error:
        raise LinkError(f"{command[0]} is not installed beside this Python: pip install fedtune again") from error
    except subprocess.TimeoutExpired as error:
        raise LinkError(f"{' '.join(command[:2])} gave no answer within {COMMAND_TIMEOUT:.0f} s") from error


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _ended(what: str, code: int | None, log: Path) -> str:
    return f"{what} ended with exit code {code}; its log {log} ends: {processes.tail(log)}"
