"""Runs the HTTP server beside the engine, in this process or in several of its own: start, report, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import uvloop

from benthic import collector
from benthic.errors import EngineDeadError, ServeError
from benthic.serve.client import EngineClient
from benthic.serve.fleet import Fleet, start_router
from benthic.serve.fleet_metrics import FleetCollector
from benthic.serve.fleet_routes import OwnInstances
from benthic.serve.fronts import Fronts, spread
from benthic.serve.http import Stop, answer, listen, say_where
from benthic.serve.hub import Hub, RoutedJournal
from benthic.serve.metrics import Metrics, kv_usage
from benthic.serve.rate_limit import Buckets
from benthic.serve.rehearsal import rehearse
from benthic.serve.router import Router
from benthic.serve.service import Service
from benthic.serve.tracing import Traces, open_traces
from benthic.serve.whole import Alone

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable

    from benthic.serve.client import Client
    from benthic.serve.http import Parts, ServerOptions
    from benthic.serve.journal import Journal
    from benthic.serve.messages import Ready, Stats
    from benthic.serve.process import EngineFactory

logger = logging.getLogger("benthic.serve")


async def serve(engines: EngineFactory | Fleet, bound: socket.socket, parts: Parts) -> int:
    """Serve until a signal; returns the exit status: 0 after a clean drain, 1 when the engine was lost.

    Raises:
        ServeError: the model could not be loaded, or the port was taken meanwhile.
        ConfigError: traces are asked for, but OpenTelemetry is not installed.
    """
    stop = Stop()
    stop.install()
    journal = RoutedJournal(time.monotonic)
    traces = _trace(parts, journal)
    client = _start(engines, parts.options, journal)
    try:
        if not await _loaded(client, stop):
            return 0
        async with _reporting(client, parts.options.report_s):
            answering = _serve if parts.options.fronts == 1 else _serve_fronts
            return await answering(client, bound, parts, stop, journal)
    finally:
        await client.close()
        bound.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


async def warm_up(engines: EngineFactory | Fleet, options: ServerOptions) -> int:
    """Start what would serve, answer the rehearsal's requests and end; returns the exit status.

    Raises:
        ServeError: the model could not be loaded, or a request failed.
    """
    stop = Stop()
    stop.install()
    began = time.monotonic()
    client = _start(engines, options, RoutedJournal(time.monotonic))
    try:
        if not await _loaded(client, stop):
            return 1
        up = time.monotonic()
        count = await rehearse(client, await client.wait_ready())
    finally:
        await client.close()
    logger.info(
        "warm: up in %.1f s, %d requests answered in %.1f s; what was compiled is kept",
        up - began, count, time.monotonic() - up,
    )  # fmt: skip
    return 0


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


def _whole(client: Client, ready: Ready, parts: Parts, clock: Callable[[], float]) -> Alone:
    """What is one for all processes that answer; kept in this one."""
    name, per_minute = parts.settings.served_names[0], parts.options.requests_per_minute
    metrics = Metrics(name, ready, lambda: client.stats, parts.options.objectives)
    instances = None
    if isinstance(client, Router):
        metrics.add(FleetCollector(name, client))
        instances = OwnInstances(client.members)
    buckets = None if per_minute is None else Buckets(per_minute, clock)
    return Alone(metrics, instances=instances, buckets=buckets)


async def _serve(client: Client, bound: socket.socket, parts: Parts, stop: Stop, journal: Journal) -> int:
    """Answer in this process."""
    ready = await client.wait_ready()
    whole = _whole(client, ready, parts, journal.clock)
    journal.on_end(whole.metrics.phases)
    service = Service(
        client=client,
        ready=ready,
        tokenizer=parts.tokenizer,
        template=parts.template,
        journal=journal,
        settings=parts.settings,
        whole=whole,
        wall=parts.wall,
    )
    listen(bound)
    say_where(bound, parts.settings, ready)
    return 0 if await answer(service, bound, parts, stop) else 1


async def _serve_fronts(
    client: Client, bound: socket.socket, parts: Parts, stop: Stop, journal: RoutedJournal
) -> int:
    """Let processes of their own answer, which this one stands behind. Raises: ServeError."""
    ready = await client.wait_ready()
    hub = Hub(
        client,
        ready=ready,
        whole=_whole(client, ready, parts, journal.clock),
        settings=parts.settings,
        journal=journal,
        started_at=int(parts.wall()),
        log_level=logger.getEffectiveLevel(),
    )
    try:
        fronts = Fronts(hub, spread(bound, parts.options.fronts), parts)
        try:
            await fronts.wait_serving()
            say_where(bound, parts.settings, ready)
            return await _stand_behind(hub, fronts, client, stop, parts.options)
        finally:
            await fronts.kill()
    finally:
        await hub.close()


async def _stand_behind(hub: Hub, fronts: Fronts, client: Client, stop: Stop, options: ServerOptions) -> int:
    """Wait for a signal, or the end of all fronts."""
    stopped, ended = asyncio.ensure_future(stop.drain.wait()), asyncio.ensure_future(fronts.wait_ended())
    broken = asyncio.ensure_future(hub.wait_broken())
    await asyncio.wait({stopped, ended, broken}, return_when=asyncio.FIRST_COMPLETED)
    for task in (stopped, ended):
        task.cancel()
    if broken.done():
        broken.result()
    if not stop.drain.is_set():
        logger.error("no front is left")
        return 1
    logger.info("draining in at most %.0f s; a second signal stops now", options.drain_s)
    clean = await fronts.stop(stop.now, options.drain_s)
    return 0 if clean and client.trouble is None else 1


@contextlib.asynccontextmanager
async def _reporting(client: Client, every_s: float) -> AsyncIterator[None]:
    """Throughput in the log, meanwhile; 0 seconds write none."""
    task = asyncio.create_task(_report(client, every_s)) if every_s else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


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


def run_warm_up(engines: EngineFactory | Fleet, options: ServerOptions) -> int:
    """`warm_up` on a new event loop."""
    return uvloop.run(warm_up(engines, options))
