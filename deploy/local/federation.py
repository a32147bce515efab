"""A whole federation on one machine, by the commands that people type: `fedtune serve`, `fedtune join`, `fedtune run`.

Each node has its own FEDTUNE_HOME, as if it were on its own machine; only byte counters stand between them and
the server's port.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.common import processes
from deploy.common.flower_cli import Control, flower_environment
from deploy.common.join_token import decode_token
from deploy.common.paths import private_folder
from deploy.local.proxy import ByteProxy, Traffic
from fedtune_strategies.config import Scalar
from fedtune_strategies.errors import LinkError, NodesError, error_from_code
from fedtune_strategies.folders import remove_folder

# Seconds. A server needs about 8, four nodes on two cores about 20; a busy machine, many times that.
START_TIMEOUT = 300.0
SERVER = "server"  # its log's name
# All nodes are one person's: any run is answered, and what they compute can be repeated.
OWN = ("--yes", "--set", "terms.methods=any", "--set", "draw-key=public")


@dataclass(frozen=True)
class Federation(Control):
    """A running federation; made by `federation`.

    `folder`: the server's state, as ``fedtune serve`` keeps it.
    `environment`: the operator's environment, for ``fedtune`` and for Flower's commands.
    `nodes`: ``fedtune join`` of each node, by name.
    `node_ids`: the nodes' ids in messages and in the ledger, by name.
    `logs`: folder of what these commands print.
    """

    server: subprocess.Popen[bytes]
    nodes: dict[str, subprocess.Popen[bytes]]
    node_ids: dict[str, int]
    proxy: ByteProxy
    logs: Path

    def alive(self) -> list[str]:
        """Names of the nodes whose process runs."""
        return [name for name, process in self.nodes.items() if process.poll() is None]

    def traffic(self) -> dict[str, Traffic]:
        """Bytes that each node's connection has carried since the start."""
        return self.proxy.snapshot()

    def log(self, name: str) -> Path:
        """Log file of a node's SuperNode."""
        return next((self.logs.parent / name).glob("nodes/*/logs/supernode.log"))

    def check(self) -> None:
        """Raise `LinkError` if the server has ended, and `NodesError` if all nodes have."""
        if self.server.poll() is not None:
            raise LinkError(_ended(SERVER, self.server, self.logs))
        if not self.alive():
            name, process = next(iter(self.nodes.items()))
            raise NodesError("no node is left: " + _ended(name, process, self.logs))

    def tune(self, settings: Mapping[str, Scalar], *, to_stderr: bool = False) -> None:
        """Tune a model by ``fedtune run``, which shows its progress where we show ours; its exit code tells why not."""
        file = self.logs / "run.toml"
        # Strings, numbers and booleans are written alike in JSON and TOML.
        file.write_text("".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in settings.items()))
        output = sys.stderr if to_stderr else None
        command = ["fedtune", "run", "--config", str(file)]
        # Its own session: Ctrl-C reaches us alone, and we stop it with everything else.
        process = subprocess.Popen(command, env=self.environment, stdout=output, start_new_session=True)
        try:
            code = process.wait()
        finally:
            processes.stop([process])
        if code:
            raise error_from_code(code, f"`fedtune run` ended with code {code}, see above; settings: {file}")


@contextlib.contextmanager
def federation(
    folder: Path,
    data: Mapping[str, Path],
    *,
    port: int = 0,
    threads: int = 1,
) -> Iterator[Federation]:
    """Serve, let the nodes join, each with its data file, wait until all are online, and stop everything when left.

    All of it is stopped on every way out: the end of the block, an error, Ctrl-C, SIGTERM, SIGHUP and, by a watchdog
    process, kill -9 of this process. The folder gets one for the operator and for each owner; an earlier federation's
    is replaced. `threads` are those of numerical libraries in each node's processes.
    """
    if not data:
        raise NodesError("a federation needs at least one node: name its data file")
    if port:
        processes.check_port("127.0.0.1", port)
    remove_folder(folder.resolve())
    folder, port = private_folder(folder.resolve()), port or processes.free_port()
    logs, token = private_folder(folder / "logs"), secrets.token_hex(16)
    operator = {
        **flower_environment(folder / "operator" / "server"),
        "FEDTUNE_HOME": str(folder / "operator"),
        processes.TOKEN: token,
    }
    # Nodes that share a machine share its cores: numerical threads beyond that fight each other.
    owner = operator | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.termination_as_exit())
        stack.enter_context(processes.watchdog(token))
        stack.callback(processes.sweep, token)
        server = _serve(port, operator, logs)
        stack.callback(processes.stop, [server])
        proxy = stack.enter_context(ByteProxy("127.0.0.1", port, list(data)))
        nodes: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(lambda: processes.stop(list(nodes.values())))
        for name, word in _fedtune(["nodes", "invite", *data], operator).items():
            # The token's address is where the node finds the server: here, through its byte counter.
            environment = {
                **owner,
                "FEDTUNE_HOME": str(folder / name),
                "FEDTUNE_TOKEN": replace(decode_token(word), address=proxy.address(name)).encode(),
            }
            command = ["fedtune", "join", *OWN, "--data", str(data[name].resolve())]
            nodes[name] = processes.start(command, environment, logs / f"{name}.log")
        _wait_online(nodes, logs)
        node_ids = {row["name"]: row["node_id"] for row in _fedtune(["nodes"], operator)}
        yield Federation(folder / "operator" / "server", operator, server, nodes, node_ids, proxy, logs)


def _serve(port: int, environment: dict[str, str], logs: Path) -> subprocess.Popen[bytes]:
    command = ["fedtune", "serve", "--address", f"127.0.0.1:{port}", "--listen", "127.0.0.1"]
    server = processes.start(command, environment, logs / f"{SERVER}.log")
    _wait({SERVER: server}, logs, "serving")
    return server


def _wait_online(nodes: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> None:
    _wait(nodes, logs, "connected")


def _wait(started: Mapping[str, subprocess.Popen[bytes]], logs: Path, word: str) -> None:
    """Wait until every command has said a word."""

    def silent() -> list[str]:
        for name, process in started.items():
            if process.poll() is not None:
                raise LinkError(_ended(name, process, logs))
        return [name for name in started if f" {word}" not in (logs / f"{name}.log").read_text(errors="replace")]

    def failure() -> str:
        name = next(iter(silent()), next(iter(started)))
        return f"{name} was not ready; its log {logs}/{name}.log ends: {processes.tail(logs / f'{name}.log')}"

    processes.wait_until(lambda: not silent(), START_TIMEOUT, failure)


def _fedtune(arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Call a command of ours and return its facts."""
    command = ["fedtune", *arguments, "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT)
    if done.returncode:
        raise error_from_code(done.returncode, done.stderr.strip().removeprefix("fedtune: "))
    return json.loads(done.stdout)


def _ended(name: str, process: subprocess.Popen[bytes], logs: Path) -> str:
    log = logs / f"{name}.log"
    return f"{name} ended with exit code {process.poll()}; its log {log} ends: {processes.tail(log)}"
