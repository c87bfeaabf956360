"""What a token costs the main process that passes it on to the fronts, and how many a second it can pass on.

The hub and what stands behind it are the real ones: one engine's client, or a router before several.
Engines have no model and put out a token of every request each step; fronts are processes that read and
count, without HTTP, so that on two cores the hub is what limits. Its cost is the CPU time of its process over
the tokens, that of sending in ZeroMQ's own thread included.

    python benchmarks/hub.py
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import logging
import multiprocessing
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from front import Echo, cpu_seconds
from provenance import write_result

from benthic import collector
from benthic.serve.client import EngineClient
from benthic.serve.hub import Hub, RoutedJournal
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.metrics import Metrics
from benthic.serve.remote import FrontJournal, RemoteClient
from benthic.serve.router import Router, RouterOptions
from benthic.serve.service import ServiceSettings
from benthic.serve.whole import Alone

if TYPE_CHECKING:
    from benthic.serve.client import Client
    from benthic.serve.front_messages import Seat


def main() -> None:
    """One hub for each number of engines and of streams."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--fronts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--streams", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    rows = []
    for engines, fronts, streams in itertools.product(words.engines, words.fronts, words.streams):
        rows.append(uvloop.run(measure(engines, fronts, streams, words.tokens, words.step_ms / 1e3)))
        print(rows[-1], flush=True)
    print(write_result("hub", rows, out=words.out, tokens=words.tokens, step_ms=words.step_ms))


async def measure(
    engines: int, fronts: int, streams: int, tokens: int, step_seconds: float
) -> dict[str, Any]:
    """Rates and costs of a hub in this process."""
    journal = RoutedJournal(time.monotonic)
    client = start(engines, step_seconds, journal)
    ready = await client.wait_ready()
    settings = ServiceSettings(served_names=("m",), root="m", max_num_seqs=streams, max_waiting=streams)
    hub = Hub(
        client,
        ready=ready,
        whole=Alone(Metrics("m", ready, lambda: client.stats)),
        settings=settings,
        journal=journal,
        started_at=0,
        log_level=logging.WARNING,
    )
    seats = [hub.join(slot, fronts).seat for slot in range(fronts)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count, args=(seat, streams // fronts, tokens)) for seat in seats]
    for process in processes:
        process.start()
    try:
        collector.settle()
        while not client.in_flight:
            await asyncio.sleep(0.005)
        return {"engines": engines, "fronts": fronts, **await watch(client, processes, streams, tokens)}
    finally:
        for process in processes:
            await asyncio.to_thread(process.join)
        await hub.close()
        await client.close()


def start(engines: int, step_seconds: float, journal: RoutedJournal) -> Client:
    """An engine's client, or a router before several."""
    if engines == 1:
        return EngineClient(functools.partial(Echo, step_seconds))
    factory = functools.partial(Echo, step_seconds)
    return Router(lambda *_: factory, {"decode": engines}, RouterOptions(), journal=journal)


async def watch(
    client: Client, processes: list[multiprocessing.process.BaseProcess], streams: int, tokens: int
) -> dict[str, Any]:
    """CPU time from the first request to the end of the last."""
    own = multiprocessing.current_process().pid or 0
    pids = [own, *(process.pid or 0 for process in processes)]
    cpu, began = [cpu_seconds(pid) for pid in pids], time.perf_counter()
    while client.in_flight:
        await asyncio.sleep(0.02)
    seconds = time.perf_counter() - began
    used = [cpu_seconds(pid) - before for pid, before in zip(pids, cpu, strict=True)]
    made = streams * tokens
    return {
        "streams": streams,
        "tokens_per_second": round(made / seconds),
        "hub_cpu_us_a_token": round(used[0] / made * 1e6, 2),
        "hub_tokens_per_cpu_second": round(made / used[0]),
        "hub_busy": round(used[0] / seconds, 2),
        "reading_cpu_us_a_token": round(sum(used[1:]) / made * 1e6, 2),
    }


def count(seat: Seat, streams: int, tokens: int) -> None:
    """Body of a front's process: read that many streams, and count."""
    uvloop.run(read_all(seat, streams, tokens))


async def read_all(seat: Seat, streams: int, tokens: int) -> None:
    """Raises: RuntimeError when a token is missing."""
    client = RemoteClient(seat, FrontJournal(time.monotonic, slot=seat.slot, slots=seat.slots), lambda: None)
    await client.wait_ready()
    found = await asyncio.gather(*(read(client, f"{seat.slot}-{i}", tokens) for i in range(streams)))
    await client.leave()
    if set(found) != {tokens}:
        message = f"streams of {tokens} tokens had {sorted(set(found))}"
        raise RuntimeError(message)


async def read(client: RemoteClient, name: str, tokens: int) -> int:
    """One request to its end."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    seen = 0
    async with client.open([Generate(request_id=name, prompt=(40, 41), params=params)]) as stream:
        async for delta in stream:
            seen += len(delta.tokens)
    return seen


if __name__ == "__main__":
    main()
