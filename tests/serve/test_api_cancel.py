from __future__ import annotations

import asyncio
import json
import signal
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from running import Running, fake_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = {"model": "fake", "prompt": [40], "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Twenty milliseconds a step: a whole answer would take five seconds."""
    log = tmp_path_factory.mktemp("slow") / "log"
    with fake_server(tokenizer_folder, log, step_seconds=0.02) as running:
        yield running


def test_a_client_that_leaves_a_stream_frees_its_blocks_at_once(slow: Running) -> None:
    before = slow.metrics().get("benthic:request_success_total{abort}", 0)
    body = LONG | {"stream": True, "n": 3}
    with slow.http() as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        slow.wait_until(lambda m: m["benthic:num_requests_running"] == 3)
    slow.wait_idle()
    assert slow.metrics()["benthic:request_success_total{abort}"] == before + 3


def test_a_client_that_stops_waiting_for_a_whole_answer_frees_its_blocks_too(slow: Running) -> None:
    before = slow.metrics().get("benthic:request_success_total{abort}", 0)
    with slow.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.3)
    slow.wait_until(lambda m: m.get("benthic:request_success_total{abort}", 0) == before + 1)
    slow.wait_idle()


def test_a_client_that_leaves_before_its_first_token_is_forgotten(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", step_seconds=0.05, max_num_seqs=1) as running:
        with (
            running.http() as http,
            http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{running.url}/v1/completions", json=LONG | {"stream": True}, timeout=0.3)
            running.wait_until(lambda m: m["benthic:num_requests_waiting"] == 0)
        running.wait_idle()


def test_clients_that_leave_do_not_disturb_those_that_stay(slow: Running) -> None:
    async def stay(http: httpx.AsyncClient, first: int) -> int:
        body = LONG | {"prompt": [first], "max_tokens": 20}
        return (await http.post("/v1/completions", json=body)).json()["usage"]["completion_tokens"]

    async def leave(http: httpx.AsyncClient) -> None:
        async with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=slow.url, timeout=30) as http:
            tasks = [stay(http, 40 + i) if i % 2 else leave(http) for i in range(24)]
            results = await asyncio.gather(*tasks)
        assert [result for result in results if result is not None] == [20] * 12

    asyncio.run(scenario())
    slow.wait_idle()


def test_sigterm_refuses_new_requests_finishes_the_others_and_exits_with_zero(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    async def scenario(running: Running) -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
            body = LONG | {"max_tokens": 100}
            whole = asyncio.create_task(http.post("/v1/completions", json=body))
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                running.process.send_signal(signal.SIGTERM)
                while "draining 2 requests" not in running.log.read_text():
                    await asyncio.sleep(0.01)
                late = await http.post("/v1/completions", json=body)
                assert (late.status_code, late.headers["retry-after"]) == (503, "1")
                assert late.json()["error"]["code"] == "shutting_down"
                assert (await http.get("/health")).status_code == 503
                events = [line async for line in lines if line]
            assert events[-1] == "data: [DONE]"
            assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert (await whole).json()["usage"]["completion_tokens"] == 100

    with fake_server(tokenizer_folder, tmp_path / "log", step_seconds=0.02) as running:
        asyncio.run(scenario(running))
        assert running.process.wait(10) == 0


@pytest.mark.parametrize("how", ["late", "twice"])
def test_a_drain_that_takes_too_long_or_a_second_signal_ends_requests_with_an_error(
    tokenizer_folder: Path, tmp_path: Path, how: str
) -> None:
    async def scenario(running: Running) -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
            whole = asyncio.create_task(http.post("/v1/completions", json=LONG))
            await asyncio.to_thread(running.wait_until, lambda m: m["benthic:num_requests_running"] == 1)
            began = time.monotonic()
            running.process.send_signal(signal.SIGINT)
            if how == "twice":
                while "draining 1 requests" not in running.log.read_text():
                    await asyncio.sleep(0.01)
                running.process.send_signal(signal.SIGINT)
            answer = await whole
            assert answer.status_code == 503
            error = answer.json()["error"]
            assert error["code"] == "shutting_down", "no engine has died"
            assert "shutting down" in error["message"]
            assert time.monotonic() - began < 15  # of the 25 that it would take

    drain_s = 0.5 if how == "late" else 60
    with fake_server(tokenizer_folder, tmp_path / "log", step_seconds=0.1, drain_s=drain_s) as running:
        asyncio.run(scenario(running))
        assert running.process.wait(10) == 0
