"""The commands of SuperLink, SuperNode and executor, and the secrets between them."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.common.certificates import ServerFiles, server_files
from deploy.common.paths import private_folder, write_private
from deploy.flower import versions
from fedtune_strategies.folders import remove_folder


def make_secret(file: Path) -> Path:
    """Write a new secret to a file that its owner alone can read."""
    write_private(file, secrets.token_hex(32).encode())
    return file


def superlink(
    files: ServerFiles, token: Path, secret: Path, *, control: int, fleet: int, more: Sequence[str] = ()
) -> list[str]:
    """A SuperLink: TLS, node keys, ``token`` for its control interface and ``secret`` for its executor."""
    return [
        *_program("superlink"),
        str(token),
        str(fleet),
        *("--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate)),
        *("--ssl-keyfile", str(files.key), "--enable-supernode-auth"),
        *("--host", "127.0.0.1", "--port", str(control)),
        # The executor is its own process, so that runs outlive the SuperLink.
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        "--disable-runtime-dependency-installation",
        *more,
    ]


class Runtime:
    """What a SuperNode and its executor share: a secret, and a certificate that shows the executor whom it asks.

    Parameters
    ----------
    folder : Path
        Gets both, new ones at each start; nobody else needs them.
    port : int
        Of 127.0.0.1, for the SuperNode's runtime interface.
    """

    def __init__(self, folder: Path, port: int) -> None:
        remove_folder(folder)
        self._files = server_files(private_folder(folder))
        self._secret = make_secret(folder / "executor.secret")
        self.port = port

    def supernode(self, superlink: str, authority: Path, key: Path, node_config: str) -> list[str]:
        """The SuperNode; ``node_config`` is in Flower's notation."""
        return [
            *_program("supernode"),
            *(*versions.SUPERNODE, "--superlink", superlink),
            *("--root-certificates", str(authority), "--auth-supernode-private-key", str(key)),
            *("--node-config", node_config),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret)),
            *("--ssl-ca-certfile", str(self._files.authority), "--ssl-certfile", str(self._files.certificate)),
            *("--ssl-keyfile", str(self._files.key)),
        ]

    def executor(self, supernode: int) -> list[str]:
        """The executor of a SuperNode with this process id; it ends with it."""
        return executor(self.port, self._files.authority, self._secret, supernode)


def executor(runtime: int, authority: Path, secret: Path, parent: int) -> list[str]:
    """The executor of a SuperLink or SuperNode whose runtime interface is at a port of 127.0.0.1."""
    return [
        *_program("executor"),
        *("--runtime-api-address", f"127.0.0.1:{runtime}", "--root-certificates", str(authority)),
        *("--superexec-auth-secret-file", str(secret), "--parent-pid", str(parent)),
    ]


def _program(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", f"deploy.flower.{name}"]
