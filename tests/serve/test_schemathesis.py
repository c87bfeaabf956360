"""Requests that schemathesis makes of /openapi.json: whatever is sent, the answer is one that is declared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running import benthic_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running import Running

# A schema cannot say that prompt and context fit together, or that a grammar parses.
UNSAID = "positive_data_acceptance"


@pytest.fixture
def server(nano_checkpoint: Path, tmp_path: Path) -> Iterator[Running]:
    flags = ("--served-model-name", "nano", "--disable-log-requests", "--disable-uvicorn-access-log")
    with benthic_server(nano_checkpoint, tmp_path / "log", *flags) as running:
        yield running


@pytest.mark.slow
def test_no_request_gets_an_answer_that_is_not_declared(server: Running, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
        "--checks", "all", "--exclude-checks", UNSAID, "--max-examples", "5", "--seed", "1",
        "--request-timeout", "30", "--generation-deterministic",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 10" in done.stdout, done.stdout[-2000:]
    server.wait_idle()
