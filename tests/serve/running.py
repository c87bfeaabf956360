"""Starts servers for tests, waits until they answer, and reads their metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
START_S = 60


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen
    url: str
    log: Path

    def client(self, **options) -> OpenAI:
        defaults = {"api_key": "unused", "max_retries": 0, "timeout": 30}
        return OpenAI(base_url=f"{self.url}/v1", **(defaults | options))

    def http(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def metrics(self) -> dict[str, float]:
        """Samples by name; labels other than the model's are appended as `name{value}`."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
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
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=True,
        )
        return next(int(line.split()[0]) for line in listing.stdout.splitlines() if "spawn_main" in line)


def gauges(metrics: dict[str, float]) -> dict[str, float]:
    """The engine's own figures, without the histograms."""
    return {name: value for name, value in metrics.items() if "_seconds_" not in name and "{" not in name}


def idle(metrics: dict[str, float]) -> bool:
    busy = metrics["benthic:num_requests_running"] + metrics["benthic:num_requests_waiting"]
    return busy == 0 and metrics["benthic:kv_blocks_free"] == metrics["benthic:kv_blocks"]


@contextmanager
def start(command: list[str], log: Path, port: int | None = None) -> Iterator[Running]:
    """Run a server until the end of the block; it prints its port first, unless `port` is given."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        port = int(process.stdout.readline()) if port is None else port
        running = Running(process, f"http://127.0.0.1:{port}", log)
        wait_healthy(running)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        process.stdout.close()


def wait_healthy(running: Running) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert running.process.poll() is None, running.log.read_text()
        assert time.monotonic() < deadline, running.log.read_text()
        try:
            if httpx.get(f"{running.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


def fake_server(tokenizer: Path, log: Path, **settings):
    """A server round the fake engine."""
    return start([sys.executable, str(HERE / "fake_server.py"), str(tokenizer), json.dumps(settings)], log)
