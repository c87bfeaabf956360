from __future__ import annotations

import asyncio
import functools
import signal
import subprocess
import sys
import time
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import fake_engine
import pytest
from processes import wait_gone

from benthic.errors import AdmissionError, EngineDeadError, ServerClosingError
from benthic.serve.client import EngineClient, set_within
from benthic.serve.messages import Generate, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

LIMIT_S = 30


def run(coroutine: Coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


@asynccontextmanager
async def engine(factory=fake_engine.fake, **arguments) -> AsyncIterator[EngineClient]:
    client = EngineClient(factory, **arguments)
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.close()


def request(name: str, prompt: tuple[int, ...] = (10, 11), max_tokens: int = 5) -> Generate:
    return Generate(request_id=name, prompt=prompt, params=SamplingParams(max_tokens=max_tokens))


async def tokens_of(client: EngineClient, asked: Generate) -> list[int]:
    return [token async for delta in client.generate(asked) for token in delta.tokens]


async def wait_until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)


def test_tokens_come_back_in_order_and_concurrent_requests_do_not_mix() -> None:
    async def scenario() -> None:
        async with engine() as client:
            answers = await asyncio.gather(
                *(tokens_of(client, request(f"r{i}", (7 * i + 4,), 6)) for i in range(40))
            )
            assert answers == [[7 * i + 5 + k for k in range(6)] for i in range(40)]
            assert client.in_flight == 0

    run(scenario())


def test_a_step_that_may_wait_hears_of_requests_until_it_is_due() -> None:
    async def scenario() -> None:
        async with engine(fake_engine.patient) as client:
            async with client.open([request("a", (10,), 2)]) as first:
                deltas = aiter(first)
                assert (await anext(deltas)).tokens == (11,)
                assert await tokens_of(client, request("b", (20,), 1)) == [21]
                assert (await anext(deltas)).tokens == (12,)
            await wait_until(lambda: client.stats.num_running == 0 and client.stats.generation_tokens == 3)
            assert client.stats.steps == 2

    run(scenario())


def test_a_request_sent_before_the_engine_has_started_is_served() -> None:
    async def scenario() -> None:
        client = EngineClient(fake_engine.fake)
        try:
            assert await tokens_of(client, request("early", (20,), 3)) == [21, 22, 23]
        finally:
            await client.close()

    run(scenario())


def test_several_requests_share_one_stream_and_one_can_end_early() -> None:
    async def scenario() -> None:
        async with engine(functools.partial(fake_engine.fake, 0.005)) as client:
            seen: dict[str, list[int]] = {"a": [], "b": []}
            async with client.open([request("a", (10,), 200), request("b", (50,), 4)]) as stream:
                async for delta in stream:
                    seen[delta.request_id].extend(delta.tokens)
                    if delta.request_id == "a" and len(seen["a"]) == 2:
                        stream.abort("a")
            assert seen["b"] == [51, 52, 53, 54]
            assert seen["a"] == [11, 12]
            await wait_until(lambda: client.stats.num_running == 0)

    run(scenario())


def test_leaving_a_stream_aborts_the_request_and_frees_its_blocks() -> None:
    async def scenario() -> None:
        async with engine(functools.partial(fake_engine.fake, 0.002)) as client:
            async with aclosing(client.generate(request("a", max_tokens=100_000))) as deltas:
                async for _ in deltas:
                    break
            assert client.in_flight == 0
            await wait_until(
                lambda: client.stats.num_running == 0 and client.stats.num_free_blocks == fake_engine.BLOCKS
            )

    run(scenario())


def test_a_refused_request_raises_the_engines_words_and_harms_nobody() -> None:
    async def scenario() -> None:
        async with engine() as client:
            with pytest.raises(AdmissionError, match="9 blocks, but the cache has 4"):
                await tokens_of(client, request("a", (fake_engine.POISON_REJECT,)))
            assert await tokens_of(client, request("b", (20,), 2)) == [21, 22]

    run(scenario())


def test_a_request_that_fails_in_the_engine_ends_with_its_error_alone() -> None:
    async def scenario() -> None:
        async with engine() as client:
            deltas = [d async for d in client.generate(request("a", (fake_engine.POISON_ERROR,)))]
            assert deltas[-1].finish_reason == "error"
            assert "NaN" in deltas[-1].error
            assert client.trouble is None

    run(scenario())


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (fake_engine.POISON_CRASH, "index out of range in the embedding"),
        (fake_engine.POISON_KILL, "was killed by signal 9"),
    ],
)
def test_when_the_engine_dies_every_request_in_flight_fails_with_the_cause(poison: int, words: str) -> None:
    async def scenario() -> None:
        async with engine(functools.partial(fake_engine.fake, 0.002)) as client:
            others = [
                asyncio.create_task(tokens_of(client, request(f"r{i}", max_tokens=100_000))) for i in range(5)
            ]
            await wait_until(lambda: client.stats.num_running == 5)
            with pytest.raises(EngineDeadError, match=words):
                await tokens_of(client, request("bad", (poison,)))
            results = await asyncio.gather(*others, return_exceptions=True)
            assert [type(r) for r in results] == [EngineDeadError] * 5
            assert words in client.trouble
            with pytest.raises(EngineDeadError):
                await tokens_of(client, request("late"))

    run(scenario())


def test_an_engine_that_hangs_is_reported_then_killed_and_its_requests_fail() -> None:
    async def scenario() -> None:
        async with engine(stall_s=1.5, silent_s=0.5) as client:
            hung = asyncio.create_task(tokens_of(client, request("a", (fake_engine.POISON_HANG,))))
            await wait_until(lambda: client.trouble is not None)
            assert "has not been heard of" in client.trouble
            with pytest.raises(EngineDeadError, match="said nothing for"):
                await hung

    run(scenario())


def test_an_idle_engine_keeps_reporting_and_stays_healthy() -> None:
    async def scenario() -> None:
        async with engine(stall_s=9.0, silent_s=2.5) as client:
            await asyncio.sleep(3.0)
            assert client.trouble is None

    run(scenario())


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    async def scenario() -> None:
        client = EngineClient(fake_engine.broken)
        try:
            with pytest.raises(EngineDeadError, match="truncated: 100 bytes of 200"):
                await client.wait_ready()
        finally:
            await client.close()

    run(scenario())


def test_closing_leaves_no_process_and_no_files_and_fails_what_was_in_flight() -> None:
    async def scenario() -> None:
        client = EngineClient(functools.partial(fake_engine.fake, 0.002))
        await client.wait_ready()
        task = asyncio.create_task(tokens_of(client, request("a", max_tokens=100_000)))
        await wait_until(lambda: client.stats.num_running == 1)
        await client.close()
        with pytest.raises(ServerClosingError, match="shutting down"):
            await task
        assert not Path(f"/proc/{client.pid}").exists()
        assert not client._pipes.folder.exists()

    run(scenario())


@pytest.mark.parametrize("turns", range(5))
def test_a_wait_that_is_cancelled_as_it_ends_is_cancelled(turns: int) -> None:
    """The one on the engine's end; it went on, and closing waited for it for ever."""

    async def scenario() -> None:
        event = asyncio.Event()
        waiting = asyncio.create_task(set_within(event, 10))
        for _ in range(4):
            await asyncio.sleep(0)
        event.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        if not waiting.done():
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(scenario())


ORPHAN = """
import asyncio, functools, sys
sys.path.insert(0, {folder!r})
import fake_engine
from benthic.serve.client import EngineClient
from benthic.serve.messages import Generate, SamplingParams

async def main():
    client = EngineClient(functools.partial(fake_engine.fake, 0.001))
    await client.wait_ready()
    asked = Generate(request_id="a", prompt=(5,), params=SamplingParams(max_tokens=10**9))
    async for _ in client.generate(asked):
        print(client.pid, flush=True)
        await asyncio.sleep(3600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_leaves_when_the_http_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN.format(folder=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    engine_pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_gone([engine_pid], 10)
