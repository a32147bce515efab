"""The node's side of its stream: the worker keeps it open to the run's ServerApp and answers tasks that come over it.

An offer of a stream arrives with a message of Flower's. A connection that breaks is made again after a pause that
grows; a secret that the server no longer takes ends the stream until the next offer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.stream.frames import LONGEST_FRAME, METHOD, SECRET, SERVICE, Welcome
from fedtune_strategies.stream.link import Incoming, Link, Outgoing, prepare
from fedtune_strategies.stream.loop import call
from fedtune_strategies.stream.offer import STREAM_ADDRESS, Offer

log = logging.getLogger("fedtune")

BEAT_S, IDLE_BEAT_S = 4.0, 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
_OPEN_S = 20.0  # for a connection to be accepted
_LEAVE_S = 1.0
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", LONGEST_FRAME),
    ("grpc.keepalive_time_ms", 30_000),  # a server that is silent for a minute is gone
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),  # costs more bytes than a warm round's payload
    ("grpc.http2.lookahead_bytes", 2**20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]  # fmt: skip

Do = Callable[[str, bytes], tuple[str, bytes]]


class Stream:
    """The worker's stream; none before the first offer.

    `do`: from a task's kind and payload to the reply's: the same that answers Flower's messages.
    `end`: ends the worker for a reason: where a task takes longer than the server waits, nothing else stops it.
    `step`: how far the task is: steps begun, and all of them; signs of life say it.
    `shown`: makes what is entered while a connection is there.
    """

    def __init__(
        self,
        do: Do,
        end: Callable[[str], None],
        step: Callable[[], tuple[int, int]] = lambda: (0, 0),
        shown: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._do, self._end, self._step, self._shown = do, end, step, shown
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream-task")
        self._offer: Offer | None = None
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, offer: Offer) -> None:
        """Take up an offer, unless it is the one that is followed already."""
        call(self._follow(offer))

    def leave(self, gone: bool) -> None:
        """Tell the server that this worker ends, and whether its SuperNode is gone too."""
        with contextlib.suppress(TimeoutError):
            call(self._leave(gone), _LEAVE_S)

    async def _follow(self, offer: Offer) -> None:
        if offer == self._offer:
            return
        if self._task:
            self._task.cancel()
        self._offer = offer
        self._task = asyncio.ensure_future(self._keep(offer))

    async def _leave(self, gone: bool) -> None:
        if self._task and self._link and not self._task.done():
            self._link.leave(gone)
            await asyncio.wait([self._task])

    async def _keep(self, offer: Offer) -> None:
        """Keep a session until the server ends it."""
        link = self._link = Link(
            lambda task: self._take(link, task), beat=BEAT_S, idle_beat=IDLE_BEAT_S, step=self._step
        )
        address = (offer.shared and os.environ.get(STREAM_ADDRESS)) or offer.address
        credentials = grpc.ssl_channel_credentials(offer.certificate.encode())
        options = [*_OPTIONS, ("grpc.ssl_target_name_override", offer.name)]
        secret, pause = offer.secret, FIRST_PAUSE_S
        while not (link.left or link.farewell):
            try:
                async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
                    open_stream = channel.stream_stream(f"/{SERVICE}/{METHOD}")
                    stream = open_stream(metadata=((SECRET, secret),))
                    welcome = await link.frame(stream.read, _OPEN_S)
                    if not isinstance(welcome, Welcome):
                        raise ProtocolError("the server of the stream does not begin with a welcome.")
                    secret, pause = welcome.secret.hex(), FIRST_PAUSE_S
                    log.info("working over a stream to %s", address)
                    with self._shown():
                        await link.run(stream.read, stream.write)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    return
                log.debug("the stream broke: %s", error.details())
            except (asyncio.InvalidStateError, TimeoutError) as error:
                log.debug("the stream broke: %r", error)
            except asyncio.CancelledError:
                # gRPC says so too where the other side's connection ended.
                if (mine := asyncio.current_task()) and mine.cancelling():
                    raise
            except Exception as error:  # Flower carries the messages
                log.warning("the stream ends: %r", error)
                return
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _take(self, link: Link, task: Incoming) -> None:
        """Do a task in the thread for tasks, and send its reply."""
        loop = asyncio.get_running_loop()
        overtime = loop.call_later(task.note, self._end, "a task took longer than the server waits")

        def work() -> Outgoing:
            return prepare(*self._do(task.kind, task.payload), task.number)

        def reply(done: asyncio.Future[Outgoing]) -> None:
            overtime.cancel()
            if error := done.exception():
                log.error("a defect of FedTune", exc_info=error)
                self._end("a task raised")  # the server sends it again by Flower, which reports it
            else:
                link.send(done.result())
                log.info("answered a task over the stream")

        loop.run_in_executor(self._work, work).add_done_callback(reply)
