"""Servers that measurements start for themselves."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from benthic.bench import served
from benthic.errors import ServeError

if TYPE_CHECKING:
    from pathlib import Path

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print(*sys.argv[1:-1], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What is started instead of `benthic serve`, with the words and the port behind it."""
    file = tmp_path / "server.py"

    def command(words: list[str], port: int) -> list[str]:
        return [sys.executable, str(file), *words, str(port)]

    monkeypatch.setattr(served, "serve_command", command)
    return file


def test_a_server_answers_for_the_length_of_the_block_and_is_gone_after_it(
    script: Path, tmp_path: Path
) -> None:
    script.write_text(
        f"import signal, sys\nsignal.signal({signal.SIGTERM:d}, lambda *_: sys.exit(0))\n" + HEALTHY
    )
    with served.serving(["model", "--flag"], tmp_path / "log") as server:
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.process.poll() is None
        socket.create_connection(("127.0.0.1", server.port)).close()
    assert server.process.returncode == 0
    assert "model --flag" in (tmp_path / "log").read_text()


def test_a_server_that_ends_at_once_is_reported_with_its_words(script: Path, tmp_path: Path) -> None:
    script.write_text("raise SystemExit('no such model')")
    with (
        pytest.raises(ServeError, match=r"ended with status 1(?s:.)*no such model"),
        served.serving(["x"], tmp_path / "log"),
    ):
        pytest.fail("it never answered")


def test_a_server_that_never_answers_is_stopped(script: Path, tmp_path: Path) -> None:
    script.write_text("import time; time.sleep(600)")
    with (
        pytest.raises(ServeError, match="not healthy within 1 s"),
        served.serving([], tmp_path / "log", start_s=1.0),
    ):
        pytest.fail("it never answered")


def test_a_server_that_ends_badly_is_reported_after_the_block(script: Path, tmp_path: Path) -> None:
    script.write_text(HEALTHY)
    with (
        pytest.raises(ServeError, match="ended with status -15"),
        served.serving([], tmp_path / "log") as server,
    ):
        pass
    assert server.process.returncode == -signal.SIGTERM


def test_a_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", served.free_port())):
        pass


def test_the_command_is_this_interpreters_benthic() -> None:
    assert served.serve_command(["m", "--x"], 7) == [
        sys.executable,
        "-m",
        "benthic",
        "serve",
        "m",
        "--x",
        "--port",
        "7",
    ]
