"""The status page of ``fedtune serve``: all runs of the operator, under the server's own certificate."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from deploy.common.address import is_loopback, own_host, split_listen
from deploy.common.certificates import server_files
from deploy.common.paths import private_folder, runs_folder, write_private
from deploy.status.server import serve_page


@contextlib.contextmanager
def operators_page(folder: Path, where: str) -> Iterator[str]:
    """Serve the page of the operator's runs until left.

    `folder`: the server's state. The token is that in ``status.token``, made where absent; beyond loopback its
        certificate is used.
    `where`: ``host:port``; port 0 takes a free one.
    Raises `ConfigError`: ``where`` is no address.
    Raises `PortError`: the address cannot be bound.
    """
    host, port = split_listen(where)
    token = kept_token(folder / "status.token")
    if is_loopback(host):
        with serve_page(runs_folder(), token, host, port) as url:
            yield url
        return
    files = server_files(folder / "keys")
    with serve_page(runs_folder(), token, host, port, certificate=files.certificate, key=files.key) as url:
        yield url.replace(urlsplit(url).netloc, f"{_reachable(host)}:{urlsplit(url).port}")


def kept_token(file: Path) -> str:
    """Return the token in a file that only its owner can read; made where absent."""
    if not file.exists():
        private_folder(file.parent)
        write_private(file, secrets.token_urlsafe(24).encode())
    return file.read_text().strip()


def _reachable(host: str) -> str:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            return own_host()
    return f"[{host}]" if ":" in host else host
