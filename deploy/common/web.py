"""A small HTTP server for people and Prometheus: GET alone, few requests at a time, a token for all that is private.

Also on loopback: other accounts of the machine reach that as its owner does. Starlette finds the page and uvicorn
speaks HTTP; connections are accepted here, because uvicorn limits neither their number before a request nor the seconds
that a TLS handshake or a request may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedtune_strategies.errors import ConfigError, FedTuneError, PortError, ResourceError

MAX_REQUESTS = 16  # at a time; whoever comes then is turned away
REQUEST_SECONDS = 10.0  # from the connection to the whole answer
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "Authorization, Accept-Encoding",
    "Connection": "close",
}

Page = Callable[[Request], Response]


def site(public: Mapping[str, Page], guarded: Mapping[str, Page], token: str) -> Starlette:
    """Put pages together, by path: those for everybody, and those for whoever shows the token."""

    def route(path: str, page: Page, *, guard: bool) -> Route:
        def answer(request: Request) -> Response:
            shown = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
            allowed = hmac.compare_digest(shown, token.encode())
            if guard and not allowed:
                return PlainTextResponse("show the token\n", 401, {"WWW-Authenticate": "Bearer"})
            try:
                return page(request)
            except FedTuneError as error:
                # The line names folders: it is for whoever has the token.
                return PlainTextResponse(f"{error}\n" if allowed else "what is served cannot be read\n", 503)

        return Route(path, answer)

    routes = [route(*one, guard=False) for one in public.items()] + [route(*one, guard=True) for one in guarded.items()]
    packed = Middleware(GZipMiddleware, minimum_size=1000, compresslevel=1)
    return Starlette(routes=routes, middleware=[Middleware(_Secured), packed])


class _Secured:
    """Adds `_HEADERS` to every answer that does not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, secured)


@contextlib.contextmanager
def serving(
    pages: Starlette, host: str, port: int, *, certificate: Path | None = None, key: Path | None = None
) -> Iterator[str]:
    """Serve a site in a thread until left; port 0 takes a free one, certificate and key make it HTTPS."""
    tls = _tls(certificate, key) if certificate and key else None
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise PortError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port.") from None
    listener.setblocking(False)
    loop = asyncio.new_event_loop()
    accepting = loop.create_task(_accept(pages, listener, tls))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(accepting)

    port = int(listener.getsockname()[1])
    thread = threading.Thread(target=run, name=f"http {port}", daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/"
    finally:
        loop.call_soon_threadsafe(accepting.cancel)
        thread.join()
        loop.close()
        listener.close()


async def _accept(pages: Starlette, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
    # Whoever sends nonsense or leaves early fills no log.
    config = Config(pages, ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False)
    loop, busy = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    try:
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # it left already, or no more files can be opened
                await asyncio.sleep(0.1)
                continue
            if len(busy) >= MAX_REQUESTS:
                connection.close()
                continue
            task = loop.create_task(_answer(config, connection, tls))
            busy.add(task)
            task.add_done_callback(busy.discard)
    finally:
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)


async def _answer(config: Config, connection: socket.socket, tls: ssl.SSLContext | None) -> None:
    """Answer one request; a place is not held by silence, nor by dripping bytes."""
    closed = asyncio.Event()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(REQUEST_SECONDS):
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_accepted_socket(lambda: _Connection(config, closed), connection, ssl=tls)
            try:
                await closed.wait()
            finally:
                transport.abort()


class _Connection(H11Protocol):
    def __init__(self, config: Config, closed: asyncio.Event) -> None:
        super().__init__(config, ServerState(), {})
        self._closed = closed

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._closed.set()


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(f"{certificate} and {key} do not make a certificate: {error.reason}.") from None
    except OSError as error:
        raise ResourceError(f"{certificate} or {key}: {error.strerror}; check the path.") from None
    return context
