"""What ``flwr`` does for an operator: submit, watch and stop runs, register and list nodes, of one SuperLink."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from deploy.common import processes
from deploy.common.paths import private_folder, write_private
from fedtune_strategies.errors import ConfigError, FedTuneError, LinkError, RunError

CONNECTION = "fedtune"
CONTROL_TOKEN = "control.secret"  # in a server's folder: what its control interface asks for
COMMAND_TIMEOUT = 180.0  # seconds; a command needs 2, on a busy machine many times that


@dataclass(frozen=True)
class RunStatus:
    """What the SuperLink says about a run."""

    state: str  # pending, starting, running, finished:completed, finished:failed or finished:stopped
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run has ended, in any way."""
        return self.state.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether the run has ended as it should."""
        return self.state == "finished:completed"


@dataclass(frozen=True)
class Control:
    """The control interface of one SuperLink; every call takes about a second of one core."""

    folder: Path  # state; ``flower/config.toml`` below it names the SuperLink, see `write_connection`
    environment: dict[str, str]  # the environment for Flower's commands

    def submit(self, app: Path, run_config: Mapping[str, str | int | float | bool]) -> int:
        """Submit a run of an app with ``flwr run``, with keys that differ from the app's own, and return its id."""
        overrides = self.folder / "run.toml"
        # Strings, numbers and booleans are written alike in JSON and TOML.
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in run_config.items()]
        write_private(overrides, "".join(lines).encode())
        return int(self._flwr(["run", str(app), CONNECTION, "--run-config", str(overrides)], ConfigError)["run-id"])

    def status(self, run_id: int) -> RunStatus:
        """Ask the SuperLink about a run."""
        runs = self._flwr(["ls", CONNECTION, "--run-id", str(run_id)], LinkError)["runs"]
        return RunStatus(runs[0]["status"], runs[0]["status-details"])

    def stop_run(self, run_id: int) -> None:
        """Stop a run; messages that nodes are working on still end there."""
        self._flwr(["stop", str(run_id), CONNECTION], RunError)

    def run_log(self, run_id: int) -> str:
        """What the run's ServerApp has written so far."""
        return _call(["flwr", "log", str(run_id), CONNECTION, "--show"], self.environment).stdout

    def register(self, public_key: Path, name: str) -> int:
        """Make a node's key known to the SuperLink; returns the node's id."""
        answer = self._flwr(["supernode", "register", str(public_key), CONNECTION, "--name", name], LinkError)
        return int(answer["node-id"])

    def unregister(self, node_id: int) -> None:
        """Forget a node's key: the node is refused from now on."""
        self._flwr(["supernode", "unregister", str(node_id), CONNECTION], LinkError)

    def registered_keys(self) -> dict[str, int]:
        """Ids of the nodes that the SuperLink knows, by public key as in `key_words`; ``flwr`` lists no keys."""
        from flwr.proto.control_pb2 import ListNodesRequest
        from flwr.supercore.constant import NodeStatus
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        place = tomllib.loads((self.folder / "flower" / "config.toml").read_text())["superlink"][CONNECTION]
        shown = {"Authorization": f"Bearer {(self.folder / CONTROL_TOKEN).read_text().strip()}"}
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        try:
            with ControlHttpClient(
                f"https://{place['address']}", interceptors=[version], verify=place["root-certificates"]
            ) as client:
                client._client.headers.update(shown)
                nodes = client.ListNodes(ListNodesRequest()).nodes_info
        except httpx.HTTPError as error:
            raise LinkError(f"the SuperLink does not list its nodes ({type(error).__name__})") from None
        return {
            key_words(
                load_pem_public_key(node.public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
            ): node.node_id
            for node in nodes
            if node.public_key and node.status != NodeStatus.UNREGISTERED
        }

    def node_states(self) -> dict[int, str]:
        """Registered nodes by id: ``online``, ``offline``, or ``registered`` where one never came."""
        nodes = self._flwr(["supernode", "list", CONNECTION], LinkError)["nodes"]
        return {int(node["node-id"]): node["status"] for node in nodes}

    def _flwr(self, arguments: Sequence[str], error: type[FedTuneError]) -> dict[str, Any]:
        """Call ``flwr … --format json`` and return its answer; its exit code says nothing, ``success`` does."""
        done = _call(["flwr", *arguments, "--format", "json"], self.environment)
        answer: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            answer, _ = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{"))
        if not answer.get("success"):
            reason = answer.get("error-message") or done.stderr or done.stdout or f"exit code {done.returncode}"
            raise error(f"flwr {arguments[0]} failed: {' '.join(str(reason).split())}")
        return answer


def key_words(public_key: str) -> str:
    """An OpenSSH public key without its comment."""
    return " ".join(public_key.split()[:2])


def flower_environment(folder: Path) -> dict[str, str]:
    """The environment for Flower's programs with their home below a folder of state."""
    exceptions = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "localhost,127.0.0.1,::1"]
    loopback = ",".join(dict.fromkeys(filter(None, exceptions)))
    return {
        **os.environ,
        "PATH": processes.environment_path(),
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Seconds between looks for a task to start. Flower's own pace is one second; a quicker one than this costs more
        # in polling than it saves (at 0.05 s, five idle executors and what they ask take 0.4 of a core).
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Our packages have ordinary names: a user's client_app.py in the present folder must not stand in for ours.
        "PYTHONSAFEPATH": "1",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


def write_connection(folder: Path, port: int, authority: Path, token: Path) -> None:
    """Tell ``flwr`` where the SuperLink's control interface is, on this machine's loopback, and what to show there."""
    from flwr.cli.constant import ACCESS_TOKEN_STORE_KEY, AUTHN_TYPE_STORE_KEY, REFRESH_TOKEN_STORE_KEY
    from flwr.common.constant import AuthnType

    home, address = private_folder(folder / "flower"), f"127.0.0.1:{port}"
    config = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
    write_private(home / "config.toml", f"{config}root-certificates = {json.dumps(str(authority))}\n".encode())
    # Where `flwr login` would keep it: `flwr` sends the first with each request, and asks for the second to be there.
    kept = {
        AUTHN_TYPE_STORE_KEY: AuthnType.OIDC,
        ACCESS_TOKEN_STORE_KEY: token.read_text().strip(),
        REFRESH_TOKEN_STORE_KEY: "none",
    }
    lines = [f"{key % address}: {base64.b64encode(value.encode()).decode()}\n" for key, value in kept.items()]
    write_private(home / "credentials.yaml", "".join(lines).encode())


def _call(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT)
    except FileNotFoundError as error:
        raise LinkError(f"{command[0]} is not installed beside this Python: pip install fedtune again") from error
    except subprocess.TimeoutExpired as error:
        raise LinkError(f"{' '.join(command[:2])} gave no answer within {COMMAND_TIMEOUT:.0f} s") from error
