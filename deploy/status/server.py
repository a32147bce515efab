"""Serve the status page and the metrics of a run while it goes on: read-only and bounded."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import hmac
import ipaddress
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy.monitoring.metrics import CONTENT_TYPE, run_metrics
from deploy.status.page import document, policy, render
from deploy.status.view import RunView, newest_runs
from fedtune_strategies.errors import ConfigError, FedTuneError, PortError, ResourceError

MAX_REQUESTS = 16  # at a time; whoever comes then is turned away
REQUEST_SECONDS = 10.0
FRESH_SECONDS = 1.0  # the ledger is looked at once in so long, however many ask
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_TEXT = "text/plain; charset=utf-8"


@dataclass
class Runs:
    """The runs of a folder, followed: each row of a ledger is read once."""

    folder: Path
    views: dict[Path, RunView] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    body: bytes = b""
    tag: str = ""
    looked: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self) -> Runs:
        """Take up what is new, at most once in `FRESH_SECONDS`."""
        with self.lock:
            if time.monotonic() - self.looked > FRESH_SECONDS or not self.looked:
                self._read()
                self.looked = time.monotonic()
        return self

    def _read(self) -> None:
        paths = newest_runs(self.folder)
        self.views = {path: self.views.get(path) or RunView(path) for path in paths}
        changed = [view.update() for view in self.views.values()]
        if any(changed) or not self.body or len(paths) != len(self.reports):
            self.reports = [view.report() for view in self.views.values()]
            data = document(self.reports)
            self.tag = '"' + hashlib.sha256(json.dumps(self.reports).encode()).hexdigest()[:20] + '"'
            self.body = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()


@contextlib.contextmanager
def serve_page(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    *,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Iterator[str]:
    """Serve a run, or all runs of a folder, until left.

    ``/`` is the page, ``/report.json`` its data, ``/metrics`` the same for Prometheus, ``/healthz`` says whether the
    ledger can be read. The page itself holds nothing of a run, so it needs no token; everything that does takes it as
    ``Authorization: Bearer``. It comes to the page behind the address's ``#``, which no log and no proxy sees.

    Parameters
    ----------
    folder : Path
        A run's folder, or a folder in which runs will be.
    host : str
        Address to listen on.
    port : int
        Port; 0 takes a free one.
    token : str
        What a reader must show; required unless ``host`` is loopback.
    certificate, key : Path, optional
        PEM files for HTTPS.

    Yields
    ------
    str
        The address to open, token included.

    Raises
    ------
    ConfigError
        A token is missing where the address is not loopback, or certificate and key do not fit.
    PortError
        The address cannot be bound.
    """
    if not token and not is_loopback(host):
        raise ConfigError(f"the status page on {host} needs a token: give it one, or let it listen on 127.0.0.1.")
    tls = _tls(certificate, key) if certificate and key else None
    try:
        server = _Server((host, port), type("Handler", (_Handler,), {"runs": Runs(folder), "token": token}), tls)
    except OSError as error:
        raise PortError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port.") from None
    thread = threading.Thread(target=server.serve_forever, name="status page", daemon=True)
    thread.start()
    name = f"[{host}]" if ":" in host else host
    try:
        yield f"{'https' if tls else 'http'}://{name}:{server.server_port}/" + (f"#token={token}" if token else "")
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler], tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.tls = tls
        self.slots = threading.Semaphore(MAX_REQUESTS)
        self.open: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking the name service who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn away whoever comes while all slots are taken."""
        return self.slots.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one request and give its slot back."""
        self.open[request] = time.monotonic()
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.open.pop(request, None)
            self.slots.release()

    def service_actions(self) -> None:
        """Cut off whoever takes too long: a slot is not held by dripping bytes."""
        for request, since in list(self.open.items()):
            if time.monotonic() - since > REQUEST_SECONDS:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the request's own thread: a slow client holds up nobody."""
        request.settimeout(REQUEST_SECONDS)
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        with self.tls.wrap_socket(request, server_side=True) as secured:
            self.open[secured] = self.open.pop(request)
            try:
                super().finish_request(secured, client_address)
            finally:
                self.open.pop(secured, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: whoever sends nonsense or leaves early fills no log."""


class _Handler(BaseHTTPRequestHandler):
    runs: Runs
    token: str
    server_version = "FedTune"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        try:
            self._answer(urlsplit(self.path).path)
        except FedTuneError as error:
            # Its line names folders: it is for whoever may read the run.
            line = str(error) if self._may_read() else "the ledger cannot be read"
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{line}\n".encode())

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, path: str) -> None:
        if not self.token and self.headers.get("Host", "").rsplit(":", 1)[0].strip("[]") not in _LOOPBACK:
            # A page from elsewhere that had its name resolved to this machine.
            return self._send(HTTPStatus.MISDIRECTED_REQUEST, _TEXT, b"ask for localhost\n")
        if path == "/":
            return self._send(HTTPStatus.OK, "text/html; charset=utf-8", render(None).encode())
        if path == "/healthz":
            self.runs.look()
            return self._send(HTTPStatus.OK, _TEXT, b"ok\n")
        if path not in ("/report.json", "/metrics"):
            return self._send(HTTPStatus.NOT_FOUND, _TEXT, b"not here\n")
        if not self._may_read():
            return self._send(HTTPStatus.UNAUTHORIZED, _TEXT, b"show the token\n", {"WWW-Authenticate": "Bearer"})
        runs = self.runs.look()
        if path == "/metrics":
            return self._send(HTTPStatus.OK, CONTENT_TYPE, run_metrics(runs.reports))
        if self.headers.get("If-None-Match") == runs.tag:
            return self._send(HTTPStatus.NOT_MODIFIED, "application/json", b"", {"ETag": runs.tag})
        return self._send(HTTPStatus.OK, "application/json", runs.body, {"ETag": runs.tag})

    def _may_read(self) -> bool:
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="replace")
        return not self.token or hmac.compare_digest(shown, self.token.encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Cache-Control": "no-store", **(headers or {})}
        if len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1)
            headers["Content-Encoding"] = "gzip"
        self.send_response(status)
        for name, value in {**headers, **_SECURITY, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log of requests."""


_SECURITY = {
    "Content-Security-Policy": policy() + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Vary": "Authorization, Accept-Encoding",
}


def is_loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(f"{certificate} and {key} do not make a certificate: {error.reason}.") from None
    except OSError as error:
        raise ResourceError(f"{certificate} or {key}: {error.strerror}; check the path.") from None
    return context
