"""How many tokens a second the processes stream that stand before all engines, and what a token costs each.

The HTTP server is the real one and so is the pipe behind it; the engine has no model and puts out a token of
every request each step. Clients are one process that reads bytes and counts. A token's cost is the server's
CPU time over the tokens; where it has less of it than the engine asks for, tokens that wait become one event,
and the second column says how many events were sent for them. Requests for one token, one at a time and with
prompts of token ids, say what a request costs; others, some time apart, how long after one its token is with
the client of `benthic bench serve`, the engine's step taken off. With several fronts the main process passes
tokens on, and its cost is given beside theirs: on few cores all share those with clients and engine, so that
costs say more than rates.

    python benchmarks/front.py
    python benchmarks/front.py --fronts 1 2
    python benchmarks/front.py --streams --out front_requests.json    # requests alone
    python benchmarks/front.py --ways --fronts 1 4 --out front_ways.json    # first tokens' ways alone
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from provenance import write_result
from random_checkpoint import make_folder, shape

from benthic.bench.client import Target, connect
from benthic.bench.served import free_port
from benthic.bench.workload import Work
from benthic.serve import http, launch, server
from benthic.serve.messages import Delta, Generate, Ready, Stats
from benthic.serve.service import ServiceSettings
from benthic.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE_S = 0.03
"""Between requests whose first token is waited for: as far apart as those of a front at a moderate rate."""
VOCAB = 320
MODEL = "without-a-model"


@dataclass
class Echo:
    """An engine that counts upwards: a token of every request each `step_seconds`."""

    step_seconds: float
    requests: dict[str, Generate] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        """Whether any request runs."""
        return bool(self.requests)

    def ready(self) -> Ready:
        """A model of which only the sizes exist."""
        sizes = {"max_model_len": 8192, "vocab_size": VOCAB, "num_blocks": 1 << 20, "block_size": 64}
        return Ready(model_name=MODEL, eos_token_ids=(1,), **sizes)

    def add(self, request: Generate) -> None:
        """Run it from the next step on."""
        self.requests[request.request_id], self.counts[request.request_id] = request, 0

    def abort(self, request_id: str) -> None:
        """Forget it."""
        self.requests.pop(request_id, None)

    def step(self) -> list[Delta]:
        """A token for each."""
        time.sleep(self.step_seconds)
        return [self._advance(request) for request in list(self.requests.values())]

    def _advance(self, request: Generate) -> Delta:
        name = request.request_id
        self.counts[name] += 1
        ended = self.counts[name] >= request.params.max_tokens
        if ended:
            del self.requests[name], self.counts[name]
        token = 40 + self.counts.get(name, 0) % 200
        return Delta(request_id=name, tokens=(token,), finish_reason="length" if ended else None)

    def stats(self) -> Stats:
        """Nothing worth knowing."""
        zeros = dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits", "preemptions", "steps"), 0)
        totals = {"prompt_tokens": 0, "generation_tokens": 0, "step_seconds": 0.0, "num_waiting": 0}
        blocks = {"num_blocks": 1 << 20, "num_free_blocks": 1 << 20}
        return Stats(num_running=len(self.requests), **totals, **blocks, **zeros)


def main() -> None:
    """One server for each number of streams."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="*", default=[16, 64, 256, 512])
    parser.add_argument("--fronts", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 1024, 4096])
    parser.add_argument("--step-ms", type=float, default=15.0)
    parser.add_argument("--ways", action="store_true", help="nothing but how long first tokens take")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_folder(Path(folder) / "model", shape(small=True))
        for fronts, streams in itertools.product(words.fronts, () if words.ways else words.streams):
            rows.append(measure(model, fronts, streams, words.tokens, words.step_ms / 1e3))
            print(rows[-1], flush=True)
        for prompt_tokens in () if words.ways else words.prompts:
            rows.append(measure_requests(model, prompt_tokens))
            print(rows[-1], flush=True)
        for fronts, prompt_tokens in itertools.product(words.fronts, words.prompts):
            rows.append(measure_way(model, fronts, prompt_tokens))
            print(rows[-1], flush=True)
    print(write_result("front", rows, out=words.out, tokens=words.tokens, step_ms=words.step_ms))


def measure(model: Path, fronts: int, streams: int, tokens: int, step_seconds: float) -> dict[str, Any]:
    """Start a server, let that many requests stream from it at once, and end it."""
    with started(model, step_seconds, fronts) as (port, pid):
        return {"fronts": fronts, **uvloop.run(load(port, pid, streams, tokens, fronts))}


def measure_requests(model: Path, prompt_tokens: int, requests: int = 300) -> dict[str, Any]:
    """What a request for one token costs the process that answers it; one comes after another."""

    async def ask(port: int, pid: int) -> float:
        await until_up(port)
        for _ in range(20):
            await stream(port, 1, prompt_tokens)
        before = cpu_seconds(pid)
        for _ in range(requests):
            await stream(port, 1, prompt_tokens)
        return cpu_seconds(pid) - before

    with started(model, 1e-3, 1) as (port, pid):
        used = uvloop.run(ask(port, pid))
    cost = round(used / requests * 1e6, 1)
    return {"fronts": 1, "prompt_tokens": prompt_tokens, "cpu_us_a_request": cost}


def measure_way(model: Path, fronts: int, prompt_tokens: int, requests: int = 200) -> dict[str, Any]:
    """How long a request and its first token are on their way, with nobody else there, `PAUSE_S` apart."""
    step_seconds = 1e-3

    async def ask(port: int, pid: int) -> float:
        await until_up(port)
        if fronts > 1:
            await until_up_all(pid, fronts)
        target = Target(
            base_url=f"http://127.0.0.1:{port}", api="openai", model=MODEL, extra={"ignore_eos": True}
        )
        work = Work(prompt=tuple(40 + place % 200 for place in range(prompt_tokens)), output_tokens=1)
        times = []
        async with connect(target, time.perf_counter) as client:
            for _ in range(20 + requests):
                answer = await client.send(work)
                times.append(answer.deliveries[0].at_s - answer.sent_s)
                await asyncio.sleep(PAUSE_S)
        return statistics.median(times[20:])

    with started(model, step_seconds, fronts) as (port, pid):
        way = round((uvloop.run(ask(port, pid)) - step_seconds) * 1e3, 3)
    return {"fronts": fronts, "prompt_tokens": prompt_tokens, "ms_a_first_token": way}


@contextlib.contextmanager
def started(model: Path, step_seconds: float, fronts: int) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    port = free_port()
    words = (model, port, step_seconds, fronts)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=words)
    process.start()
    try:
        yield port, process.pid or 0
    finally:
        process.terminate()
        process.join()


def serve(model: Path, port: int, step_seconds: float, fronts: int) -> None:
    """Body of the server's process."""
    logging.basicConfig(level=logging.WARNING)
    settings = ServiceSettings(served_names=(MODEL,), root=MODEL, max_num_seqs=1024, max_waiting=1024)
    parts = http.Parts(
        tokenizer=Tokenizer.from_folder(model),
        template=None,
        settings=settings,
        options=http.ServerOptions(access_log=False, report_s=0, fronts=fronts),
        wall=time.time,
    )
    server.run(functools.partial(Echo, step_seconds), launch.bind("127.0.0.1", port), parts)


async def load(port: int, pid: int, streams: int, tokens: int, fronts: int) -> dict[str, Any]:
    """Rates and costs of `streams` requests at once, after a few that warm up."""
    await until_up(port)
    answering = [pid]
    if fronts > 1:
        answering = await until_up_all(pid, fronts)
    await asyncio.gather(*(stream(port, 8) for _ in range(8 * fronts)))
    cpu, began = {each: cpu_seconds(each) for each in (pid, *answering)}, time.perf_counter()
    events = sum(await asyncio.gather(*(stream(port, tokens) for _ in range(streams))))
    seconds = time.perf_counter() - began
    used = {each: cpu_seconds(each) - before for each, before in cpu.items()}
    made, front_s = streams * tokens, sum(used[each] for each in answering)
    row = {
        "streams": streams,
        "tokens_per_second": round(made / seconds, 1),
        "events_a_token": round(events / made, 3),
        "cpu_us_a_token": round(front_s / made * 1e6, 1),
        "tokens_per_cpu_second": round(made / front_s, 1),
    }
    if fronts == 1:
        return row
    return row | {
        "hub_cpu_us_a_token": round(used[pid] / made * 1e6, 1),
        "share_of_each_front": [round(used[each] / front_s, 3) for each in answering],
    }


async def until_up_all(pid: int, fronts: int) -> list[int]:
    """The processes of the fronts: the children of the main process behind the first, which is the engine."""
    async with asyncio.timeout(60):
        while len(found := children(pid)) < 1 + fronts:
            await asyncio.sleep(0.1)
    await asyncio.sleep(3)  # the last one imports what it needs
    return found[1:]


def children(pid: int) -> list[int]:
    """Processes that a process started to run something of ours, in order."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]


async def until_up(port: int) -> None:
    """Wait until somebody listens. Raises: TimeoutError after a minute."""
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


async def stream(port: int, tokens: int, prompt_tokens: int = 3) -> int:
    """One request to its end; returns how many events with tokens came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    prompt = [40 + place % 200 for place in range(prompt_tokens)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    fields = "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"
    writer.write("\r\n".join(("POST /v1/completions HTTP/1.1", *fields, "\r\n")).encode() + data)
    seen = b""
    while b"[DONE]" not in seen:
        piece = await reader.read(1 << 16)
        if not piece:
            message = f"the stream ended before its end: {seen[:200]!r}"
            raise RuntimeError(message)
        seen += piece
    writer.close()
    if not seen.startswith(b"HTTP/1.1 200"):
        message = f"the server answered {seen[:200]!r}"
        raise RuntimeError(message)
    return seen.count(b"data: {")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
