"""`/dash`: samples and cards are what the server did, and the page may talk to nobody else."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import TYPE_CHECKING

import httpx
import pytest
from running import fake_server

from benthic.dash.board import median_and_p99
from benthic.dash.page import HEADERS

if TYPE_CHECKING:
    from pathlib import Path

    from running import Running

ASSETS = resources.files("benthic.dash") / "assets"
SOURCES = sorted(file.name for file in ASSETS.iterdir())


def listen(running: Running, seconds: int, **headers: str) -> list[dict]:
    """The opening and so many ticks."""
    found = []
    with httpx.stream("GET", f"{running.url}/dash/events", headers=headers, timeout=30) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
            if len(found) > seconds:
                return found
    return found


def ask(running: Running, tokens: int, **fields: object) -> httpx.Response:
    body = {"model": "fake", "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True} | fields
    return httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)


def test_events_open_with_the_past_and_go_on_with_what_has_ended(server: Running) -> None:
    ask(server, 9)
    opening, tick = listen(server, 1)
    assert (opening["kind"], opening["model"], opening["chat"]) == ("opening", "fake", True)
    assert opening["targets"] == {}
    card = opening["requests"][-1]
    assert (card["prompt"], card["tokens"], card["reason"], card["met"]) == (3, 9, "length", None)
    assert [phase[0] for phase in card["phases"]] == ["queue", "prefill", "decode"]
    ends = [time for _, start, end, _ in card["phases"] for time in (start, end)]
    assert ends == sorted(ends)
    assert card["ttft"] < card["phases"][-1][2] - card["phases"][0][1]
    assert card["tpot"] > 0
    assert tick["kind"] == "tick"
    sample = tick["sample"]
    assert sample["goodput"] is None
    assert sample["ttft"][0] <= sample["ttft"][1]
    assert sample["ended"] > 0


def test_a_failed_request_says_so_on_the_timeline(server: Running) -> None:
    assert ask(server, 4, prompt=[317]).status_code == 500
    card = listen(server, 0)[0]["requests"][-1]
    assert (card["reason"], card["tokens"], card["ttft"]) == ("error", 0, None)
    assert [phase[0] for phase in card["phases"]] == ["queue"]


def test_a_draining_server_ends_the_events(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log") as running:
        with httpx.stream("GET", f"{running.url}/dash/events", timeout=30) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines)[6:])["kind"] == "opening"
            running.process.terminate()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert running.process.wait(10) == 0


def test_the_page_opens_without_a_key_but_shows_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", api_keys=["s3cret"]) as running:
        with running.http() as http:
            assert http.get("/dash").status_code == 200
            assert http.get("/dash/assets/main.js").status_code == 200
            assert http.get("/dash/events").status_code == 401
            assert http.get("/dash/assets/../events").status_code == 401
        assert listen(running, 0, Authorization="Bearer s3cret")[0]["kind"] == "opening"


def test_every_file_of_the_page_forbids_other_hosts(server: Running) -> None:
    with server.http() as http:
        for path in ("/dash", *(f"/dash/assets/{name}" for name in SOURCES if name != "index.html")):
            answer = http.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert policy == HEADERS["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "connect-src 'self'" in policy
            assert not re.search(r"unsafe|\*|https?:", policy)
        assert http.get("/dash/assets/board.py").status_code == 404
        assert http.get("/dash/assets/nothing.js").status_code == 404


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_of_the_page_is_small_and_names_no_other_host(name: str) -> None:
    text = (ASSETS / name).read_text(encoding="utf-8")
    assert text.count("\n") < 300
    assert set(re.findall(r"\w+://[^\s\"'`)<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\beval\(|innerHTML|new Function|\sstyle=|\son\w+=\"", text)


def test_percentiles_are_nearest_ranks() -> None:
    assert median_and_p99([]) is None
    assert median_and_p99([None, 3.0]) == (3.0, 3.0)
    assert median_and_p99(range(1, 101)) == (50, 99)
