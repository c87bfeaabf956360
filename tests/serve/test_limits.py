"""Rate limits, deadlines, and what is refused in words."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import pytest
from running import fake_server

from benthic.serve import api_errors
from benthic.serve.api_errors import ApiError
from benthic.serve.messages import Delta
from benthic.serve.rate_limit import Buckets
from benthic.serve.streams import EngineStream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from running import Running


def bucket(per_minute: int, at: list[float]) -> Buckets:
    return Buckets(per_minute, lambda: at[0])


def test_a_key_may_send_a_minutes_worth_at_once_and_then_waits_for_one() -> None:
    at = [0.0]
    limit = bucket(3, at)
    assert [limit.take("a") for _ in range(3)] == [0.0, 0.0, 0.0]
    assert limit.take("a") == pytest.approx(20.0)
    assert limit.take("b") == 0.0
    at[0] = 19.0
    assert limit.take("a") == pytest.approx(1.0)
    at[0] = 20.0
    assert limit.take("a") == 0.0
    at[0] = 1000.0
    assert [limit.take("a") for _ in range(3)] == [0.0, 0.0, 0.0]
    assert limit.take("a") > 0.0


def test_keys_that_have_nothing_to_remember_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from benthic.serve import rate_limit

    monkeypatch.setattr(rate_limit, "MOST_BUCKETS", 10)
    at = [0.0]
    limit = bucket(60, at)
    for i in range(100):
        at[0] = 2.0 * i
        limit.take(f"key {i}")
    assert len(limit._buckets) <= 10


@pytest.mark.parametrize("keys", [("one", "two"), ()], ids=["by key", "by address"])
def test_beyond_the_limit_a_client_gets_429_and_others_do_not(
    tokenizer_folder: Path, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Where no keys are asked for, another word in the header is no other client."""
    body = {"model": "fake", "prompt": "a", "max_tokens": 1}
    with (
        fake_server(tokenizer_folder, tmp_path / "log", requests_per_minute=3, api_keys=keys) as limited,
        limited.http() as http,
    ):

        def ask(key: str) -> httpx.Response:
            return http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

        answers = [ask("one") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        error = answers[-1].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert ("with this key" if keys else "from this address") in error["message"]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert answers[-1].headers["x-request-id"]
        assert ask("two").status_code == (200 if keys else 429)
        assert all(http.get("/health").status_code == 200 for _ in range(5))


@pytest.fixture(scope="module")
def slow(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("slow") / "log"
    with fake_server(tokenizer_folder, log, step_seconds=0.05) as started:
        yield started


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_past_its_deadline_ends_with_408_and_frees_its_blocks(slow: Running, path: str) -> None:
    body = {"model": "fake", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    late = {"max_tokens": 200, "ignore_eos": True, "timeout_s": 0.3}
    with slow.http() as http:
        answer = http.post(path, json=body | late)
        assert answer.status_code == 408
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        in_time = http.post(path, json=body | {"max_tokens": 2, "timeout_s": 20})
        assert in_time.status_code == 200
    slow.wait_idle()


def test_a_stream_past_its_deadline_ends_with_an_error_event(slow: Running) -> None:
    body = {"model": "fake", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "timeout_s": 0.5}
    with slow.http() as http, http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) > 2
    assert "deadline_exceeded" in lines[-2]
    assert lines[-1] == "data: [DONE]"
    slow.wait_idle()


def test_embeddings_are_refused_in_words(slow: Running) -> None:
    answer = httpx.post(f"{slow.url}/v1/embeddings", json={"model": "fake", "input": "a"}, timeout=10)
    assert answer.status_code == 404
    assert "computes no embeddings" in answer.json()["error"]["message"]


def test_a_stream_whose_time_is_over_gives_what_came_and_then_aborts_the_rest() -> None:
    aborted = []

    class Client:
        def abort(self, request_id: str) -> None:
            aborted.append(request_id)

    async def late(read: list[str]) -> None:
        async with EngineStream(Client(), ["a", "b"]) as stream:
            stream.limit(0.05, api_errors.late(0.05))
            stream.put(Delta(request_id="a", tokens=(1,), finish_reason="stop"))
            async for delta in stream:
                read += [delta.request_id]

    async def in_time() -> list[str]:
        async with EngineStream(Client(), ["c"]) as stream:
            stream.limit(0.01, api_errors.late(0.01))
            stream.put(Delta(request_id="c", tokens=(1,), finish_reason="stop"))
            read = [delta.request_id async for delta in stream]
        await asyncio.sleep(0.03)
        return read

    read: list[str] = []
    with pytest.raises(ApiError, match=r"within 0\.05 s"):
        asyncio.run(late(read))
    assert read == ["a"]
    assert asyncio.run(in_time()) == ["c"]
    assert aborted == ["b"]
