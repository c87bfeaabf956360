"""Starts servers for tests, waits until they answer, and reads their metrics."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import forked
import httpx
from forked_instances import benthic_with_forked_engine, fake_with_forked_engine
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benthic.bench.served import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BENTHIC = [sys.executable, "-c", "from benthic.cli.main import main; main()"]
START_S = 180
PLAIN = False
"""Servers of tests speak no TLS, and reading its certificates takes a client 60 ms."""


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen | forked.Command
    url: str
    log: Path

    def client(self, **options) -> OpenAI:
        defaults = {"api_key": "unused", "max_retries": 0, "timeout": 30}
        return OpenAI(base_url=f"{self.url}/v1", **(defaults | options))

    def http(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=PLAIN, **options)

    def metrics(self) -> dict[str, float]:
        """Samples by name; labels other than the model's are appended as `name{value}`."""
        text = httpx.get(f"{self.url}/metrics", timeout=10, verify=PLAIN).text
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k != "model_name"]
                samples[sample.name + (f"{{{','.join(labels)}}}" if labels else "")] = sample.value
        return samples

    def wait_until(self, condition: Callable[[dict[str, float]], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.metrics()):
            assert time.monotonic() < deadline, f"not met in {timeout_s} s: {gauges(self.metrics())}"
            time.sleep(0.05)

    def wait_idle(self) -> None:
        """Until nothing runs or waits and every block is free."""
        self.wait_until(idle)

    def engine_pid(self) -> int:
        """The child that computes (the other one tracks shared resources)."""
        listing = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=True,
        )
        tracker = "resource_tracker"
        return next(int(line.split()[0]) for line in listing.stdout.splitlines() if tracker not in line)


def gauges(metrics: dict[str, float]) -> dict[str, float]:
    """The engine's own figures, without the histograms."""
    return {name: value for name, value in metrics.items() if "_seconds_" not in name and "{" not in name}


def idle(metrics: dict[str, float]) -> bool:
    busy = metrics["benthic:num_requests_running"] + metrics["benthic:num_requests_waiting"]
    return busy == 0 and metrics["benthic:kv_blocks_free"] == metrics["benthic:kv_blocks"]


@contextmanager
def running(process: subprocess.Popen | forked.Command, port: int, log: Path) -> Iterator[Running]:
    """A server that has been started, once it answers; it is ended with the block."""
    try:
        server = Running(process, f"http://127.0.0.1:{port}", log)
        wait_healthy(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except (subprocess.TimeoutExpired, TimeoutError):
                process.kill()
                process.wait()
                raise


def wait_healthy(running: Running) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert running.process.poll() is None, running.log.read_text()
        assert time.monotonic() < deadline, running.log.read_text()
        try:
            if httpx.get(f"{running.url}/health", timeout=5, verify=PLAIN).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


def fake_server(tokenizer: Path, log: Path, **settings):
    """A server round the fake engine."""
    port = free_port()
    words = [str(tokenizer), str(port), json.dumps(settings)]
    process = forked.start(words, log, program=fake_with_forked_engine, has_children=True)
    return running(process, port, log)


def benthic_server(checkpoint: Path, log: Path, *flags: str, fresh: bool = False):
    """`benthic serve` with a real engine; `fresh` as a user starts it, in interpreters of its own."""
    port = free_port()
    words = ["serve", str(checkpoint), "--port", str(port), "--num-threads", "1", *flags]
    if not fresh:
        process = forked.start(words, log, program=benthic_with_forked_engine, has_children=True)
        return running(process, port, log)
    with log.open("w") as errors:
        return running(subprocess.Popen([*BENTHIC, *words], stderr=errors), port, log)


class Connection:
    """A kept-alive HTTP/1.1 connection at a tenth of the cost of a full client."""

    def __init__(self, url: str) -> None:
        self._address = url.removeprefix("http://").split(":")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict) -> dict:
        """The whole answer of a request that succeeds."""
        reader, length = await self._send(path, body)
        return json.loads(await reader.readexactly(length))

    async def post_and_leave(self, path: str, body: dict) -> None:
        """Wait for the first bytes of a stream, then close the connection."""
        reader, _ = await self._send(path, body)
        assert await reader.read(1)
        self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _send(self, path: str, body: dict) -> tuple[asyncio.StreamReader, int]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._address[0], int(self._address[1]))
        reader, writer = self._streams
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert " 200 " in answer.splitlines()[0], answer
        lengths = [line.split(":")[1] for line in answer.splitlines() if line.startswith("content-length:")]
        return reader, int(lengths[0]) if lengths else 0
