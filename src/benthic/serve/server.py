"""Runs the HTTP server beside the engine: start, report, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import uvicorn
import uvloop

from benthic import collector
from benthic.errors import EngineDeadError, ServeError
from benthic.serve.app import create_app
from benthic.serve.client import EngineClient
from benthic.serve.fleet import Fleet, start_router
from benthic.serve.fleet_metrics import FleetCollector
from benthic.serve.journal import Journal
from benthic.serve.metrics import Metrics, kv_usage
from benthic.serve.router import Router
from benthic.serve.service import Service, ServiceSettings
from benthic.serve.tracing import Traces, open_traces

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import FrameType

    from fastapi import APIRouter

    from benthic.serve.chat_template import ChatTemplate
    from benthic.serve.client import Client
    from benthic.serve.messages import Stats
    from benthic.serve.middleware import InFlight
    from benthic.serve.process import EngineFactory
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
    """What a server is made of besides its engine; `page` makes the web page, if there is to be one."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: ServiceSettings
    options: ServerOptions
    wall: Callable[[], float]
    page: Callable[[Service], Page] | None = None


async def serve(engines: EngineFactory | Fleet, bound: socket.socket, parts: Parts) -> int:
    """Serve until a signal; returns the exit status: 0 after a clean drain, 1 when the engine was lost.

    Raises:
        ServeError: the model could not be loaded, or the port was taken meanwhile.
        ConfigError: traces are asked for, but OpenTelemetry is not installed.
    """
    stop = Stop()
    stop.install()
    journal = Journal(time.monotonic)
    traces = _trace(parts, journal)
    client = _start(engines, parts.options, journal)
    try:
        if not await _loaded(client, stop):
            return 0
        return await _serve(client, bound, parts, stop, journal)
    finally:
        await client.close()
        bound.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


def _trace(parts: Parts, journal: Journal) -> Traces | None:
    """Send a trace of every request that ends to the collector, if there is one. Raises: ConfigError."""
    endpoint = parts.options.otlp_traces_endpoint
    if endpoint is None:
        return None
    since_1970_s = parts.wall() - journal.clock()
    traces = open_traces(endpoint, model_name=parts.settings.served_names[0], since_1970_s=since_1970_s)
    journal.on_end(traces.write)
    return traces


def _start(engines: EngineFactory | Fleet, options: ServerOptions, journal: Journal) -> Client:
    """One engine, or a router before the instances of a fleet."""
    level = logger.getEffectiveLevel()
    if isinstance(engines, Fleet):
        return start_router(
            engines,
            journal=journal,
            stall_s=options.stall_s,
            log_level=level,
            objectives=options.objectives,
        )
    return EngineClient(engines, stall_s=options.stall_s, log_level=level)


async def _loaded(client: Client, stop: Stop) -> bool:
    """Wait for the model; False when a signal came first. Raises: ServeError when it cannot be loaded."""
    loading = asyncio.ensure_future(client.wait_ready())
    stopped = asyncio.ensure_future(stop.drain.wait())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        loading.cancel()
        return False
    try:
        loading.result()
    except EngineDeadError as error:
        msg = f"the model could not be loaded: {error}"
        raise ServeError(msg) from error
    collector.settle()
    return True


async def _make_service(client: Client, parts: Parts, journal: Journal) -> Service:
    ready = await client.wait_ready()
    name = parts.settings.served_names[0]
    metrics = Metrics(name, ready, lambda: client.stats, parts.options.objectives)
    journal.on_end(metrics.phases)
    if isinstance(client, Router):
        metrics.add(FleetCollector(name, client))
    return Service(
        client=client,
        ready=ready,
        tokenizer=parts.tokenizer,
        template=parts.template,
        metrics=metrics,
        journal=journal,
        settings=parts.settings,
        wall=parts.wall,
    )


async def _serve(client: Client, bound: socket.socket, parts: Parts, stop: Stop, journal: Journal) -> int:
    service = await _make_service(client, parts, journal)
    ready, settings, options = service.ready, parts.settings, parts.options
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
    _listen(bound)
    host, port = bound.getsockname()[:2]
    logger.info(
        "serving %s on http://%s:%d (context %d tokens, %d blocks of %d)",
        ", ".join(settings.served_names), host, port, ready.max_model_len, ready.num_blocks, ready.block_size,
    )  # fmt: skip
    tasks = [asyncio.create_task(_drain_when_asked(server, service, app, stop, options.drain_s))]
    if page is not None:
        tasks.append(asyncio.create_task(page.run()))
    if options.report_s:
        tasks.append(asyncio.create_task(_report(client, options.report_s)))
    try:
        await server.serve(sockets=[bound])
        return 0 if service.drained else 1
    finally:
        for task in tasks:
            task.cancel()
        service.close()


def _listen(bound: socket.socket) -> None:
    try:
        bound.listen(2048)
    except OSError as error:
        msg = f"the port was taken while the model loaded: {error.strerror}. Choose another --port."
        raise ServeError(msg) from error


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


async def _report(client: Client, every_s: float) -> None:
    """One line every `every_s` seconds while something happens, and one when it has stopped."""
    before, was_busy = client.stats, False
    while True:
        await asyncio.sleep(every_s)
        now = client.stats
        if before is not None and now is not None:
            busy = bool(now.num_running or now.num_waiting or now.steps != before.steps)
            if busy or was_busy:
                logger.info(report_line(before, now, every_s))
            was_busy = busy
        before = now


def report_line(before: Stats, now: Stats, seconds: float) -> str:
    """Throughput since the last line, and the state now."""
    queries = now.prefix_cache_queries
    hit_rate = now.prefix_cache_hits / queries if queries else 0.0
    return (
        f"prompt {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tokens/s, "
        f"generation {(now.generation_tokens - before.generation_tokens) / seconds:.1f} tokens/s, "
        f"running {now.num_running}, waiting {now.num_waiting}, "
        f"KV cache {kv_usage(now):.1%}, prefix cache hits {hit_rate:.1%}"
    )


def run(engines: EngineFactory | Fleet, bound: socket.socket, parts: Parts) -> int:
    """`serve` on a new event loop."""
    return uvloop.run(serve(engines, bound, parts))
