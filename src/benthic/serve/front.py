"""A front's own process: the HTTP app round the main process's engines. It never loads torch."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from benthic import collector
from benthic.serve.front_messages import Serving
from benthic.serve.http import Stop, answer
from benthic.serve.metrics import Metrics
from benthic.serve.remote import FrontJournal, RemoteClient, RemoteWhole
from benthic.serve.service import Service

if TYPE_CHECKING:
    import socket
    from multiprocessing.process import BaseProcess

    from benthic.serve.front_messages import Seat
    from benthic.serve.http import Parts

logger = logging.getLogger("benthic.serve.front")


def start_front(seat: Seat, bound: socket.socket, parts: Parts) -> BaseProcess:
    """Start a front (a fresh interpreter, as engines have)."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=front_main, args=(seat, bound, parts), name=f"benthic-front-{seat.slot}")
    process.start()
    return process


def front_main(seat: Seat, bound: socket.socket, parts: Parts) -> None:
    """Body of a front's process.

    SIGINT and SIGTERM are left to the main process, which gets them from a terminal or a service manager too
    and says when to drain. A front leaves when told to, or when the main process is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    form = f"%(levelname)s %(asctime)s %(name)s[{seat.slot}]: %(message)s"
    logging.basicConfig(level=seat.log_level, format=form, force=True)
    sys.exit(uvloop.run(serve_front(seat, bound, parts)))


async def serve_front(seat: Seat, bound: socket.socket, parts: Parts) -> int:
    """Answer on a socket that listens until told to stop; returns the exit status."""
    stop = Stop()
    journal = FrontJournal(time.monotonic, slot=seat.slot, slots=seat.slots)
    client = RemoteClient(seat, journal, stop.request)
    _end_with_parent(client, stop, Path(seat.to_hub.removeprefix("ipc://")).parent)
    welcome = await client.welcome()
    name = parts.settings.served_names[0]
    metrics = Metrics(name, welcome.ready, lambda: client.stats, parts.options.objectives)
    journal.on_end(metrics.phases)
    whole = RemoteWhole(client, metrics)
    service = Service(
        client=client,
        ready=welcome.ready,
        tokenizer=parts.tokenizer,
        template=parts.template,
        journal=journal,
        settings=parts.settings,
        whole=whole,
        wall=parts.wall,
    )
    service.started_at = welcome.started_at
    collector.settle()
    client.post(Serving())
    reporting = asyncio.create_task(whole.run())
    try:
        return 0 if await answer(service, bound, parts, stop) else 1
    finally:
        reporting.cancel()
        client.report()
        await client.leave()


def _end_with_parent(client: RemoteClient, stop: Stop, pipes: Path) -> None:
    """When the main process ends, so does this one, at once: nobody computes any more, or clears up."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    loop, sentinel = asyncio.get_running_loop(), parent.sentinel

    def end() -> None:
        loop.remove_reader(sentinel)
        logger.error("the main process is gone; this front ends")
        client.die("the server's main process is gone")
        shutil.rmtree(pipes, ignore_errors=True)
        stop.request()
        stop.request()

    loop.add_reader(sentinel, end)
