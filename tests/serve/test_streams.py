"""What waits to be read becomes one delta: a slow reader gets several tokens at a time, and loses none."""

from __future__ import annotations

import asyncio

import pytest

from benthic.errors import EngineDeadError
from benthic.serve.messages import Delta, Remote, TokenLogprob
from benthic.serve.streams import EngineStream


class Aborted(list):
    abort = list.append


def delta(name: str, *tokens: int, **more: object) -> Delta:
    return Delta(request_id=name, tokens=tokens, **more)


def row(token: int) -> tuple[TokenLogprob, ...]:
    return (TokenLogprob(token=token, logprob=-0.5, rank=1),)


async def read(stream: EngineStream) -> list[Delta]:
    return [each async for each in stream]


def test_what_waits_is_read_as_one_delta_with_the_first_ones_facts_and_the_last_ones_end():
    stream = EngineStream(Aborted(), ["a"])
    remote = Remote(address="x", instance_id="y", lease_id="z", blocks=(1,), num_tokens=3)
    prompt = ((), row(3))
    stream.put(delta("a", 5, logprobs=(row(5),), prompt_logprobs=prompt, cached_tokens=64, queued_s=0.25))
    stream.put(delta("a", 6, 7, logprobs=(row(6), row(7))))
    stream.put(delta("a", 8, logprobs=(row(8),), finish_reason="stop", stop_token=8, remote=remote))
    (found,) = asyncio.run(read(stream))
    assert found == delta(
        "a", 5, 6, 7, 8,
        logprobs=(row(5), row(6), row(7), row(8)),
        prompt_logprobs=prompt,
        cached_tokens=64,
        queued_s=0.25,
        finish_reason="stop",
        stop_token=8,
        remote=remote,
    )  # fmt: skip


def test_requests_of_one_stream_are_joined_each_with_its_own():
    stream = EngineStream(Aborted(), ["a", "b"])
    for token in range(3):
        for name in "ab":
            stream.put(delta(name, token, finish_reason="length" if token == 2 else None))
    found = asyncio.run(read(stream))
    assert [(each.request_id, each.tokens, each.logprobs) for each in found] == [
        ("a", (0, 1, 2), None),
        ("b", (0, 1, 2), None),
    ]


def test_tokens_before_an_error_are_read_before_it():
    stream = EngineStream(Aborted(), ["a"])
    stream.put(delta("a", 1))
    stream.put(delta("a", 2))
    stream.put(delta("a", finish_reason="error", error="the sampler saw NaN"))
    found = asyncio.run(read(stream))
    assert [each.tokens for each in found] == [(1, 2), ()]
    assert found[-1].error == "the sampler saw NaN"


def test_a_reader_that_keeps_up_gets_every_token_alone_and_the_end_of_the_engine():
    async def scenario() -> list[tuple[int, ...]]:
        stream, found = EngineStream(Aborted(), ["a"]), []
        for token in range(3):
            stream.put(delta("a", token))
            found.append((await anext(stream)).tokens)
        stream.fail(EngineDeadError("gone"))
        with pytest.raises(EngineDeadError, match="gone"):
            await anext(stream)
        return found

    assert asyncio.run(scenario()) == [(0,), (1,), (2,)]


def test_what_was_aborted_is_not_read():
    aborted = Aborted()
    stream = EngineStream(aborted, ["a", "b"])
    stream.put(delta("a", 1))
    stream.put(delta("b", 2, finish_reason="length"))
    stream.abort("a")
    assert [each.request_id for each in asyncio.run(read(stream))] == ["b"]
    assert aborted == ["a"]


def test_a_relay_gets_every_delta_as_it_came_and_the_error_behind_them():
    async def scenario() -> list[Delta]:
        stream, found = EngineStream(Aborted(), ["a", "b"]), []
        stream.put(delta("a", 1))
        relaying = asyncio.create_task(stream.relay(found.append))
        await asyncio.sleep(0)
        stream.put(delta("a", 2))
        stream.put(delta("a", 3, finish_reason="stop"))
        assert [each.tokens for each in found] == [(1,), (2,), (3,)]
        stream.fail(EngineDeadError("gone"))
        with pytest.raises(EngineDeadError, match="gone"):
            await relaying
        return found

    assert len(asyncio.run(scenario())) == 3


def test_a_relay_ends_with_the_last_request_whether_it_finished_or_was_aborted():
    async def scenario() -> list[str]:
        aborted, found = Aborted(), []
        stream = EngineStream(aborted, ["a", "b"])
        relaying = asyncio.create_task(stream.relay(found.append))
        await asyncio.sleep(0)
        stream.put(delta("a", 1, finish_reason="length"))
        stream.abort("b")
        await asyncio.wait_for(relaying, 5)
        return aborted

    assert asyncio.run(scenario()) == ["b"]
