"""The HTTP server of one process: answer until told to stop, then drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import uvicorn

from benthic.errors import ServeError
from benthic.serve.app import create_app

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import FrameType

    from fastapi import APIRouter

    from benthic.serve.chat_template import ChatTemplate
    from benthic.serve.messages import Ready
    from benthic.serve.middleware import InFlight
    from benthic.serve.service import Service, ServiceSettings
    from benthic.serve.tokenizer import Tokenizer
    from benthic.spec.objectives import Objectives

logger = logging.getLogger("benthic.serve")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the HTTP server runs.

    Attributes:
        api_keys: any of these opens the guarded paths; none means that no path is guarded.
        max_body_bytes: larger request bodies are answered with 413.
        requests_per_minute: of one key (or address); more are answered with 429. None sets no limit.
        drain_s: how long requests in flight may go on after SIGTERM.
        objectives: latency targets for the goodput counter.
        report_s: seconds between the log lines that report throughput; 0 writes none.
        stall_s: an engine silent for so long is killed.
        log_level: of uvicorn.
        access_log: one line an HTTP request.
        otlp_traces_endpoint: OpenTelemetry collector that gets a trace of every request; None writes none.
        fronts: processes that answer HTTP; with 1 it is the one that starts the engines.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    requests_per_minute: int | None = None
    drain_s: float = 30.0
    report_s: float = 10.0
    objectives: Objectives | None = None
    stall_s: float = 300.0
    log_level: str = "info"
    access_log: bool = True
    otlp_traces_endpoint: str | None = None
    fronts: int = 1


class Page(Protocol):
    """A web page on the server's port."""

    @property
    def routes(self) -> APIRouter:
        """Its paths."""
        ...

    async def run(self) -> None:
        """What it does beside answering, until cancelled."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a server is made of besides its engine; `page` makes the web page, if there is to be one.

    With several fronts it is pickled for each of them.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: ServiceSettings
    options: ServerOptions
    wall: Callable[[], float]
    page: Callable[[Service], Page] | None = None


class Stop:
    """Counts the signals that ask to stop: the first drains, the second ends everything now."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()

    def install(self) -> None:
        """Listen for SIGINT and SIGTERM on the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.request)

    def request(self) -> None:
        """One more signal."""
        (self.now if self.drain.is_set() else self.drain).set()


class QuietServer(uvicorn.Server):
    """uvicorn, with the signals left to `Stop`."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Nothing: the event loop's own handlers have the signal already."""


async def answer(service: Service, bound: socket.socket, parts: Parts, stop: Stop) -> bool:
    """Answer on a socket that listens until told to stop; whether the engines were well at the end."""
    options = parts.options
    page = None if parts.page is None else parts.page(service)
    app = create_app(
        service,
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
        requests_per_minute=options.requests_per_minute,
        page=None if page is None else page.routes,
    )
    server = QuietServer(
        uvicorn.Config(
            app,
            log_config=None,
            log_level=options.log_level,
            access_log=options.access_log,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=5,
        )
    )
    tasks = [asyncio.create_task(_drain_when_asked(server, service, app, stop, options.drain_s))]
    if page is not None:
        tasks.append(asyncio.create_task(page.run()))
    try:
        await server.serve(sockets=[bound])
        return service.drained
    finally:
        for task in tasks:
            task.cancel()
        service.close()


def listen(bound: socket.socket) -> None:
    """Let connections in. Raises: ServeError when somebody else does so at that port."""
    try:
        bound.listen(2048)
    except OSError as error:
        msg = f"the port was taken while the model loaded: {error.strerror}. Choose another --port."
        raise ServeError(msg) from error


def say_where(bound: socket.socket, settings: ServiceSettings, ready: Ready) -> None:
    """For the log: what is served at which address, defaults of the checkpoint, a context out of reach."""
    host, port = bound.getsockname()[:2]
    defaults = settings.defaults.changed()
    if defaults:
        logger.info("requests that leave them out get %s (see --generation-config)", defaults)
    held = ready.num_blocks * ready.block_size
    if held < ready.max_model_len:
        logger.warning(
            "the cache holds %d tokens, but the context is %d: requests that may need more are refused, chat "
            "without max_tokens among them. Set --max-model-len %d or give the cache more memory.",
            held, ready.max_model_len, held,
        )  # fmt: skip
    logger.info(
        "serving %s on http://%s:%d (context %d tokens, %d blocks of %d)",
        ", ".join(settings.served_names), host, port, ready.max_model_len, ready.num_blocks, ready.block_size,
    )  # fmt: skip


async def _drain_when_asked(
    server: QuietServer, service: Service, app: InFlight, stop: Stop, drain_s: float
) -> None:
    """On the first signal refuse new requests and let the others finish; on the second, or late, fail all."""
    await stop.drain.wait()
    service.draining = True
    logger.info("draining %d requests in at most %.0f s; a second signal stops now", app.count, drain_s)
    finished = asyncio.ensure_future(app.wait_idle())
    hurried = asyncio.ensure_future(stop.now.wait())
    await asyncio.wait({finished, hurried}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    clean = finished.done()
    for task in (finished, hurried):
        task.cancel()
    if not clean:
        logger.warning("stopping with %d requests in flight; they end with an error", app.count)
    service.drained = service.client.trouble is None
    await service.client.close()
    server.should_exit = True
