"""The resident worker: holds model and data between rounds, answers the messenger on a Unix socket, or over a stream.

Run as ``python -m client_app.worker FOLDER HOST_PID`` by `client_app.worker_client`. It ends when its SuperNode is
gone, when another worker took its place, on SIGTERM, or after an idle time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

import grpc
import psutil

from client_app.node import Node, note_failure, with_folder
from client_app.stats import Stats, stream_is_open
from client_app.stream import Stream
from client_app.worker_client import (
    DO,
    FOLLOW,
    GRPC_OPTIONS,
    SERVICE,
    WorkerSpec,
    joined,
    pieces,
    running_worker,
    start_of,
)
from fedtune_strategies.config.node import parse_node
from fedtune_strategies.errors import FedTuneError, ProtocolError, ResourceError
from fedtune_strategies.folders import keep_private, make_folder, remove_folder
from fedtune_strategies.logs import json_handler
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.stream.offer import decode_offer

log = logging.getLogger("fedtune")

IDLE_SECONDS = 1800.0
HOST_GONE = "its SuperNode is gone"
_WATCH_SECONDS = 0.5


class Service:
    """Answers tasks one at a time, loading the node on the first one.

    `spec`: what the worker was started for.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._node: Node | None = None
        self._busy = threading.Lock()
        self._facts = Stats()
        self.last_used = time.monotonic()

    def do(self, kind: str, payload: bytes) -> tuple[str, bytes]:
        """Answer one task; a node that cannot be loaded is a `Failure`, and tried again with the next task."""
        with self._busy:
            start = time.monotonic()
            try:
                if self._node is None:
                    spec = self._spec
                    own = with_folder(spec.node_config, spec.node_id)
                    keep_temporary_files_in(parse_node(own).cache_folder)
                    self._node = Node(spec.run_config, own, spec.node_id, self._facts.step)
                name, body = self._node.handle(kind, payload)
            except FedTuneError as error:
                log.error("%s", error)
                failure = protocol.Failure(error.exit_code, error.public)
                name, body = failure.kind, protocol.encode(failure)
                note_failure(self._spec.run_config, self._spec.node_config, self._spec.node_id, len(body))
            self.last_used = time.monotonic()
            self._facts.note(kind, name, len(payload), len(body), self.last_used - start)
        return name, body

    def step(self) -> tuple[int, int]:
        """Return how many steps of the task have begun, and how many it has; 0 of 0 where none is in work."""
        return self._facts.now

    def idle_seconds(self) -> float:
        """Return the seconds since the last task; 0 while one runs."""
        return 0.0 if self._busy.locked() else time.monotonic() - self.last_used


def keep_temporary_files_in(cache: Path) -> None:
    """Have files without a name made beside cached models: they are as large, and the system's folder may be memory.

    ``TMPDIR`` comes first, and the system's folder is taken where the cache cannot be made.
    """
    with contextlib.suppress(OSError, ResourceError):
        tempfile.tempdir = os.environ.get("TMPDIR") or str(make_folder(cache))


def serve(folder: Path, host_pid: int) -> None:
    """Serve until there is a reason to end; ``spec.json`` is in the runtime folder, `host_pid` is the SuperNode's."""
    host = psutil.Process(host_pid)
    spec = WorkerSpec(**json.loads((folder / "spec.json").read_text()))
    service = Service(spec)
    ending: SimpleQueue[str] = SimpleQueue()
    stream = Stream(service.do, ending.put, service.step, stream_is_open)
    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((_handlers(service, stream),))
    me = os.getpid()
    identity = folder / "worker.json"
    partial = identity.with_suffix(".partial")
    partial.write_text(json.dumps({"pid": me, "started": start_of(me), "key": spec.key()}))
    partial.replace(identity)
    signal.signal(signal.SIGTERM, lambda *_: ending.put("asked to"))
    server.add_insecure_port(f"unix:{folder / f'{spec.key()}.sock'}")
    server.start()
    reason = _watch(host, folder, service, ending)
    log.info("worker ends: %s", reason)
    stream.leave(gone=reason == HOST_GONE)
    if reason == HOST_GONE:
        with contextlib.suppress(OSError, ResourceError):
            remove_folder(folder)
    # A task may still be computing: nobody waits for it.
    os._exit(0)


def _watch(host: psutil.Process, folder: Path, service: Service, ending: SimpleQueue[str]) -> str:
    me = os.getpid()
    checks: list[tuple[str, Callable[[], bool]]] = [
        (HOST_GONE, lambda: not host.is_running() or host.status() == psutil.STATUS_ZOMBIE),
        ("another worker took its place", lambda: (found := running_worker(folder)) is None or found[0].pid != me),
        (f"idle for {IDLE_SECONDS:.0f} s", lambda: service.idle_seconds() > IDLE_SECONDS),
    ]
    while True:
        with contextlib.suppress(Empty):
            return ending.get(timeout=_WATCH_SECONDS)
        for reason, holds in checks:
            try:
                if holds():
                    return reason
            except psutil.NoSuchProcess:
                return HOST_GONE


def _handlers(service: Service, stream: Stream) -> grpc.GenericRpcHandler:
    """Route the messenger's two calls: a task, and an offer of a stream."""

    def do(request: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return pieces(*service.do(*joined(request)))

    def follow(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            stream.follow(decode_offer(request.decode(errors="replace")))
        except ProtocolError as error:
            log.warning("%s", error)  # the task that came with it is done all the same
        return b""

    methods = {DO: grpc.stream_stream_rpc_method_handler(do), FOLLOW: grpc.unary_unary_rpc_method_handler(follow)}
    return grpc.method_handlers_generic_handler(SERVICE, methods)


if __name__ == "__main__":
    keep_private()
    as_json = json_handler(sys.stderr)
    format = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=format, handlers=[as_json] if as_json else None)
    serve(Path(sys.argv[1]), int(sys.argv[2]))
