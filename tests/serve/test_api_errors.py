from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from fake_engine import POISON_CRASH, POISON_ERROR, POISON_KILL, POISON_REJECT
from running import fake_server

from benthic.errors import AdmissionError, OverloadedError
from benthic.serve import api_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from running import Running

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", 2.5, "less than or equal to 2"),
        ("temperature", "1", "number"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("top_k", -2, "greater than or equal to -1"),
        ("min_p", 2, "less than or equal to 1"),
        ("presence_penalty", 3, "less than or equal to 2"),
        ("frequency_penalty", -3, "greater than or equal to -2"),
        ("repetition_penalty", 0, "greater than or equal to 0.01"),
        ("max_tokens", -1, "greater than or equal to 0"),
        ("max_tokens", 1.5, "integer"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 129, "less than or equal to 128"),
        ("seed", 2**63, "less than"),
        ("logprobs", 21, "less than or equal to 20"),
        ("logit_bias", {"5": 101}, "less than or equal to 100"),
        ("logit_bias", {"x": 1}, "not a token id"),
        ("logit_bias", {"320": 1}, "320, but the vocabulary has ids 0 to 319"),
        ("stop", "", "1 to 1024"),
        ("stop", ["a"] * 65, "at most 64"),
        ("stop_token_ids", [400], "400, but the vocabulary has ids 0 to 319"),
        ("min_tokens", 17, "min_tokens = 17, but max_tokens = 16"),
        ("prompt", "", "0 tokens, but at least 1"),
        ("prompt", [], "must be text"),
        ("prompt", [320], "320, but the vocabulary has ids 0 to 319"),
        ("prompt", [-1], "must be text"),
        ("prompt", {"a": 1}, "must be text"),
        ("prompt", "\ud800", "surrogate"),
        ("stream_options", {"include_usage": True}, "stream is not true"),
        ("best_of", 129, "less than or equal to 128"),
        ("suffix", "x", "not supported"),
        ("stream", "yes", "boolean"),
    ],
)
def test_an_absurd_value_is_a_400_that_names_the_field_and_the_bound(
    http: httpx.Client, field: str, value: object, words: str
) -> None:
    body = {"model": "fake", "prompt": "a", field: value}
    error = error_of(http.post("/v1/completions", content=json.dumps(body), headers=JSON), 400)
    assert error["param"] == field
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"model": "fake", "prompt": "\xff"}', "not valid UTF-8"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"model": "fake", "prompt": "a", "temperature": NaN}', "finite"),
        (b'{"model": "fake"}', "prompt is missing"),
    ],
)
def test_a_body_that_is_no_request_is_a_400_with_the_reason(
    http: httpx.Client, content: bytes, words: str
) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        error = error_of(http.post(path, content=content, headers=JSON), 400)
        if path == "/v1/completions":
            assert words in error["message"]


@pytest.mark.parametrize("named", [{}, {"model": None}])
def test_a_request_without_a_model_is_for_the_first_that_is_served(
    http: httpx.Client, named: dict[str, None]
) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}]}
    bodies = {
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/v1/chat/completions": messages | {"max_tokens": 1},
        "/v1/responses": {"input": "a", "max_output_tokens": 1},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [40]},
    }
    for path, body in bodies.items():
        answer = http.post(path, json=body | named)
        assert answer.status_code == 200, answer.text
        assert path in {"/tokenize", "/detokenize"} or answer.json()["model"] == "fake"


def test_unknown_models_paths_and_methods_have_openai_shaped_errors(
    http: httpx.Client, server: Running
) -> None:
    error = error_of(http.post("/v1/completions", json={"model": "gpt-9", "prompt": "a"}), 404)
    assert error["code"] == "model_not_found"
    assert "Served here: fake, other/name" in error["message"]
    error_of(http.post("/tokenize", json={"model": "gpt-9", "prompt": "a"}), 404)
    error_of(http.get("/v1/models/gpt-9"), 404)
    error_of(http.get("/v2"), 404)
    error_of(http.get("/v1/completions"), 405)
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="gpt-9", prompt="a")


def test_a_prompt_beyond_the_context_is_a_400_with_the_two_numbers(http: httpx.Client) -> None:
    long = {"model": "fake", "prompt": [40] * 256}
    error = error_of(http.post("/v1/completions", json=long), 400)
    assert "256 tokens" in error["message"]
    assert error["code"] == "context_length_exceeded"
    sum_ = {"model": "fake", "prompt": [40] * 200, "max_tokens": 57}
    error = error_of(http.post("/v1/completions", json=sum_), 400)
    assert "200 tokens and max_tokens = 57: together 257, but the context holds 256" in error["message"]
    assert http.post("/v1/completions", json=sum_ | {"max_tokens": 56}).status_code == 200


def test_a_megabyte_prompt_is_refused_without_stalling_others(server: Running) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            body = {"model": "fake", "prompt": "the quick brown fox " * 50_000}
            big = asyncio.create_task(http.post("/v1/completions", json=body))
            slowest, waits, sent = 0.0, 0, time.monotonic()
            while not big.done():
                began = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                slowest, waits = max(slowest, time.monotonic() - began), waits + 1
                await asyncio.sleep(0.005)
            error = error_of(big.result(), 400)
            assert "the context holds 256" in error["message"]
            assert waits > 3
            assert slowest < max(0.3, (time.monotonic() - sent) / 2)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ("logprobs = 6, but max_logprobs = 5.", "logprobs"),
        ("logit_bias of token 5 = nan.", "logit_bias"),
        ("output holds token 999.", None),
        ("a prompt of 9 tokens needs 3.", None),
    ],
)
def test_a_refusal_of_the_engine_names_the_field_and_not_the_sequence(said: str, param: str | None) -> None:
    error = api_errors.of(AdmissionError(f"request 'cmpl-5d-0/1': {said}"))
    assert (error.status, str(error), error.param) == (400, said, param)
    full = api_errors.of(OverloadedError("request 'cmpl-5d-0' needs 5 blocks to be held."))
    assert (full.status, str(full)) == (503, "the request needs 5 blocks to be held.")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_before_the_first_token_keep_their_status(
    http: httpx.Client, *, stream: bool
) -> None:
    body = {"model": "fake", "stream": stream}
    refused = http.post("/v1/completions", json=body | {"prompt": [POISON_REJECT]})
    assert error_of(refused, 400)["message"] == "prompt needs 9 blocks, but the cache has 4"
    failed = http.post("/v1/completions", json=body | {"prompt": [POISON_ERROR]})
    assert "NaN" in error_of(failed, 500)["message"]


def test_an_error_in_mid_stream_ends_the_stream_with_an_error_event(server: Running) -> None:
    client = server.client()
    stream = client.completions.create(model="fake", prompt=[[40], [POISON_ERROR]], max_tokens=5, stream=True)
    with pytest.raises(openai.APIError, match="NaN"):
        list(stream)
    server.wait_idle()


def test_request_ids_are_echoed_or_made(http: httpx.Client) -> None:
    echoed = http.get("/health", headers={"X-Request-Id": "trace-1:a/b"})
    assert echoed.headers["x-request-id"] == "trace-1:a/b"
    for bad in ("", "x" * 129, "a b", "a\u00e9"):
        made = http.get("/health", headers={"X-Request-Id": bad.encode("latin-1")})
        assert made.headers["x-request-id"] not in ("", bad)
    assert "x-request-id" in http.get("/nowhere").headers


def test_more_sequences_than_the_server_holds_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    limits = {"max_num_seqs": 2, "max_waiting": 1, "step_seconds": 0.02}

    async def scenario(running: Running) -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
            body = {"model": "fake", "prompt": [40], "max_tokens": 50, "ignore_eos": True}
            answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(8)))
            refused = [answer for answer in answers if answer.status_code != 200]
            assert len(refused) == 5
            for answer in refused:
                error = error_of(answer, 503)
                assert "max_num_seqs + max_waiting = 2 + 1" in error["message"]
                assert int(answer.headers["retry-after"]) >= 1
            never = await http.post("/v1/completions", json=body | {"n": 4})
            assert "asks for 4 sequences" in error_of(never, 400)["message"]

    with fake_server(tokenizer_folder, tmp_path / "log", **limits) as running:
        asyncio.run(scenario(running))


def test_a_key_guards_everything_but_probes(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(
        tokenizer_folder, tmp_path / "log", api_keys=["one", "zwei"], max_body_bytes=2048
    ) as running:
        for key in ("one", "zwei"):
            assert running.client(api_key=key).completions.create(model="fake", prompt="a").choices
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
            running.client(api_key="three").models.list()
        with running.http() as http:
            for path in ("/health", "/version", "/metrics", "/openapi.json"):
                assert http.get(path).status_code == 200
            for headers in (
                {},
                {"Authorization": "Bearer"},
                {"Authorization": "one"},
                {"Authorization": "Basic one"},
            ):
                error = error_of(http.post("/tokenize", json={"prompt": "a"}, headers=headers), 401)
                assert error["code"] == "invalid_api_key"
            assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_a_body_above_the_limit_is_a_413_declared_or_not(tokenizer_folder: Path, tmp_path: Path) -> None:
    with (
        fake_server(tokenizer_folder, tmp_path / "log", max_body_bytes=2048) as running,
        running.http() as http,
    ):
        body = json.dumps({"model": "fake", "prompt": "a" * 3000}).encode()
        declared = error_of(http.post("/v1/completions", content=body, headers=JSON), 413)
        assert "at most 2048" in declared["message"]
        chunks = (body[i : i + 500] for i in range(0, len(body), 500))
        error_of(http.post("/v1/completions", content=chunks, headers=JSON), 413)
        small = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 1}).encode()
        assert http.post("/v1/completions", content=small, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("poison", "words"), [(POISON_KILL, "killed by signal 9"), (POISON_CRASH, "index out of range")]
)
def test_when_the_engine_dies_requests_end_with_500_and_health_says_503(
    tokenizer_folder: Path, tmp_path: Path, poison: int, words: str
) -> None:
    async def scenario(running: Running) -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
            body = {"model": "fake", "prompt": [40], "max_tokens": 200, "ignore_eos": True}
            plain = asyncio.create_task(http.post("/v1/completions", json=body))
            events = []
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                died = await http.post("/v1/completions", json=body | {"prompt": [poison]})
                events = [line async for line in lines if line]
            for answer in (died, await plain):
                error = error_of(answer, 500)
                assert words in error["message"]
                assert error["code"] == "engine_dead"
            assert words in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
            assert events[-1] == "data: [DONE]"
            assert words in error_of(await http.get("/health"), 503)["message"]
            error_of(await http.post("/v1/completions", json=body), 503)
            assert (await http.get("/metrics")).status_code == 200

    with fake_server(tokenizer_folder, tmp_path / "log", step_seconds=0.01) as running:
        asyncio.run(scenario(running))
    assert running.process.returncode == 1
