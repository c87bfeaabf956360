"""Several processes that answer HTTP before one engine: together they are the server that one of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
from running import fake_server

if TYPE_CHECKING:
    from pathlib import Path


def test_x(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", fronts=3) as server, server.http() as http:
        body = {"model": "fake", "prompt": [5, 6], "max_tokens": 4}
        print(http.post("/v1/completions", json=body).text)
        print(httpx.get(server.url + "/metrics").text[:3000])
    print((tmp_path / "log").read_text())
    assert 0
