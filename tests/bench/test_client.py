from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING, Any

import pytest
from canned_server import TPOT_S, TTFT_S, Canned, running

from benthic.bench.client import Target, connect
from benthic.bench.inputs import served_model
from benthic.bench.load import Load
from benthic.bench.workload import Work
from benthic.errors import ConfigError, ServeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.bench.samples import Answer


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Canned]]:
    with running() as started:
        yield started


def ask(url: str, prompt: Any, tokens: int = 5, **options: Any) -> Answer:
    async def one() -> Answer:
        target = Target(base_url=url, api="openai", model="canned", **options)
        async with connect(target, time.perf_counter) as client:
            return await client.send(Work(prompt=prompt, output_tokens=tokens))

    return asyncio.run(one())


def test_times_are_those_of_the_server(server: tuple[str, Canned]) -> None:
    answer = ask(server[0], (5, 6, 7, 8))
    assert (answer.error, answer.output_tokens, answer.prompt_tokens, answer.counted) == (None, 5, 4, True)
    first, last = answer.deliveries[0].at_s, answer.deliveries[-1].at_s
    assert TTFT_S <= first - answer.sent_s < TTFT_S + 1.0
    # a busy machine delays deliveries; it never brings them early
    assert 4 * TPOT_S * 0.9 <= last - answer.sent_s - TTFT_S < 4 * TPOT_S + 1.0


def test_a_request_carries_what_it_should(server: tuple[str, Canned]) -> None:
    ask(server[0], (1, 2), tokens=1, api_key="secret", extra={"ignore_eos": True, "temperature": 0.0})
    body = server[1].bodies[-1]
    assert body == {
        "model": "canned",
        "prompt": [1, 2],
        "max_tokens": 1,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    assert server[1].keys[-1] == "Bearer secret"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("refuse", "HTTP 429: too many requests"),
        ("break", "connection failed"),
        ("silent", "no byte in 0.2 s"),
    ],
)
def test_every_kind_of_failure_is_named(server: tuple[str, Canned], prompt: str, words: str) -> None:
    assert words in ask(server[0], prompt, timeout_s=0.2).error


def test_a_server_that_is_not_there_is_a_failed_request() -> None:
    assert "connection failed" in ask("http://127.0.0.1:1", "a").error


def test_the_servers_own_model_is_used_and_an_unknown_one_refused(server: tuple[str, Canned]) -> None:
    async def look(wanted: str | None) -> Any:
        target = Target(base_url=server[0], api="openai", model="")
        async with connect(target, time.perf_counter) as client:
            return await served_model(client, wanted)

    found = asyncio.run(look(None))
    assert (found.name, found.root, found.max_model_len) == ("canned", None, 100)
    with pytest.raises(ServeError, match="does not serve 'other', but canned"):
        asyncio.run(look("other"))


def test_chat_refuses_token_ids() -> None:
    target = Target(base_url="http://x", api="openai-chat", model="m")
    body = target.body(Work(prompt="hi", output_tokens=3))
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    with pytest.raises(ConfigError, match="chat prompts are text"):
        target.body(Work(prompt=(1, 2), output_tokens=3))


def test_what_a_request_makes_is_freed_by_reference_counts(server: tuple[str, Canned]) -> None:
    """Else a run, which Python's garbage collector does not interrupt, would fill the memory."""

    async def scenario() -> tuple[int, int]:
        target = Target(base_url=server[0], api="openai", model="canned")
        async with connect(target, time.perf_counter) as client:
            load = Load(send=client.send, clock=time.perf_counter, max_concurrency=20)
            await load.closed_loop([work] * 20)
            gc.collect()
            before = len(gc.get_objects())
            run = await load.closed_loop([work] * 200)
            kept = len(gc.get_objects()) - before
            assert not any(sample.failed for sample in run.samples)
            return kept, len(run.samples)

    work = Work(prompt=(1, 2), output_tokens=3)
    kept, requests = asyncio.run(scenario())
    own = 1 + 1 + 1 + 3  # sample, answer, tuple, deliveries
    assert kept < (own + 1) * requests
