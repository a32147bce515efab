"""A small HTTP server for people and Prometheus: GET alone, few requests at a time, a token for all that is private.

Also on loopback: other accounts of the machine reach that as its owner does.
"""

from __future__ import annotations

import contextlib
import gzip
import hmac
import ipaddress
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message as Headers
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedtune_strategies.errors import ConfigError, FedTuneError, PortError, ResourceError

MAX_REQUESTS = 16  # at a time; whoever comes then is turned away
REQUEST_SECONDS = 10.0
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "Authorization, Accept-Encoding",
}


@dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes
    ----------
    body : bytes
        The content.
    kind : str
        Its content type.
    status : HTTPStatus
        The status.
    headers : dict of str to str
        Further headers.
    """

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


# From a request's headers to its answer.
Route = Callable[[Headers], Answer]


@dataclass(frozen=True)
class Site:
    """What is served.

    Attributes
    ----------
    public : dict of str to callable
        Paths for everybody.
    guarded : dict of str to callable
        Paths for whoever shows the token.
    token : str
        The token.
    """

    public: Mapping[str, Route]
    guarded: Mapping[str, Route]
    token: str

    def answer(self, path: str, headers: Headers) -> Answer:
        """Answer a request; an error that is a line becomes one, with status 503."""
        allowed = self._allowed(headers)
        try:
            if route := self.public.get(path):
                return route(headers)
            if route := self.guarded.get(path):
                return route(headers) if allowed else _REFUSED
        except FedTuneError as error:
            # The line names folders: it is for whoever has the token.
            line = f"{error}\n" if allowed else "what is served cannot be read\n"
            return Answer(line.encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
        return Answer(b"not here\n", status=HTTPStatus.NOT_FOUND)

    def _allowed(self, headers: Headers) -> bool:
        shown = (headers.get("Authorization") or "").removeprefix("Bearer ").encode(errors="replace")
        return hmac.compare_digest(shown, self.token.encode())


_REFUSED = Answer(b"show the token\n", status=HTTPStatus.UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer"})


@contextlib.contextmanager
def serving(
    site: Site, host: str, port: int, *, certificate: Path | None = None, key: Path | None = None
) -> Iterator[str]:
    """Serve a site in a thread until left.

    Parameters
    ----------
    site : Site
        What is served.
    host : str
        Address to listen on.
    port : int
        Port; 0 takes a free one.
    certificate, key : Path, optional
        PEM files for HTTPS.

    Yields
    ------
    str
        The address to open.

    Raises
    ------
    ConfigError
        Certificate and key do not fit.
    PortError
        The address cannot be bound.
    """
    tls = _tls(certificate, key) if certificate and key else None
    try:
        server = _Server((host, port), type("Handler", (_Handler,), {"site": site}), tls)
    except OSError as error:
        raise PortError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port.") from None
    thread = threading.Thread(target=server.serve_forever, name=f"http {port}", daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def split_listen(where: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[host]:port`` of an address to listen on; port 0 is a free one.

    Raises
    ------
    ConfigError
        It is neither.
    """
    host, found, port = where.rpartition(":")
    host = host.strip("[]")
    if not found or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigError(f"{where!r} is no address to listen on: write it as host:port, such as 127.0.0.1:9096")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


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
    site: Site
    server_version = "FedTune"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer, packed where that is asked for and worth it."""
        answer = self.site.answer(urlsplit(self.path).path, self.headers)
        body, headers = answer.body, {**_SECURITY, **answer.headers, "Content-Type": answer.kind}
        if len(body) > 1000 and "gzip" in (self.headers.get("Accept-Encoding") or ""):
            body = gzip.compress(body, 1)
            headers["Content-Encoding"] = "gzip"
        self.send_response(answer.status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log of requests."""


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(f"{certificate} and {key} do not make a certificate: {error.reason}.") from None
    except OSError as error:
        raise ResourceError(f"{certificate} or {key}: {error.strerror}; check the path.") from None
    return context
