"""A server of one's own for a measurement: a free port, `benthic serve` on it, and an orderly end."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`; what it prints is in `log`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port below those that systems hand out, so that no connection takes it before the server does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue


def serve_command(words: Sequence[str], port: int) -> list[str]:
    """The command line of `benthic serve WORDS` on a port, for this interpreter."""
    return [sys.executable, "-m", "benthic", "serve", *words, "--port", str(port)]


@contextlib.contextmanager
def serving(
    words: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    start_s: float = 180.0,
    stop_s: float = 60.0,
) -> Iterator[Server]:
    """`benthic serve WORDS` on a free port for the length of the block; SIGTERM ends it.

    Raises:
        ServeError: it ended or was not healthy within `start_s`, with the end of its log; or it had to be
            killed, or ended with another status than 0.
    """
    port = free_port()
    with log.open("wb") as printed:
        process = subprocess.Popen(  # noqa: S603 (this interpreter and words of the caller)
            serve_command(words, port), stdout=printed, stderr=printed, env=None if env is None else dict(env)
        )
    server = Server(process, port, log)
    try:
        wait_healthy(server, start_s)
        yield server
    finally:
        _stop(process, stop_s)
    if process.returncode:
        raise ServeError(_words(server, f"ended with status {process.returncode}"))


def wait_healthy(server: Server, seconds: float, *, pause_s: float = 0.1) -> None:
    """Poll /health until it answers. Raises: ServeError with the end of the log when it never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServeError(_words(server, f"ended with status {server.process.returncode}"))
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):  # noqa: S310
            return
        time.sleep(pause_s)
    raise ServeError(_words(server, f"was not healthy within {seconds:.0f} s"))


def _stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _words(server: Server, what: str) -> str:
    return f"the server {what}. The end of {server.log}:\n{server.log.read_text(errors='replace')[-4000:]}"
