"""Instances in processes of their own behind a router: the tokens of one engine, whoever comes or dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import forked_instances
import pytest
from small_engine import prompts, request
from small_fleet import colocated, fleet_folder, small_router

from benthic.errors import AdmissionError, EngineDeadError, ServeError
from benthic.sched.replan import ReplanConfig
from benthic.sched.replay import replay
from benthic.sched.routing import Policy, shortest_queue
from benthic.serve.fleet_metrics import FleetCollector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path

    from benthic.serve.messages import Generate
    from benthic.serve.router import Router

LIMIT_S = 200


@pytest.fixture(autouse=True)
def _instances_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benthic.serve.client.start_engine", forked_instances.start_engine)


def run(coroutine: Coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


@asynccontextmanager
async def fleet(prefill: int, decode: int, **settings: object) -> AsyncIterator[Router]:
    with fleet_folder() as folder:
        router = small_router(folder, prefill, decode, **settings)
        try:
            await router.wait_ready()
            yield router
        finally:
            await router.close()


def seeded(count: int, *, seed: int = 0, longest: int = 40, most: int = 12) -> list[Generate]:
    """Random prompts, lengths and sampling settings; every third is greedy."""
    rng = random.Random(seed)  # noqa: S311 (not a secret)
    asked = []
    for i, prompt in enumerate(prompts(count, seed=seed, longest=longest)):
        params = {"temperature": 0.0 if i % 3 == 0 else 1.0, "seed": rng.randrange(1 << 60)}
        if i % 5 == 0:
            params |= {"top_k": 20, "frequency_penalty": 0.3}
        if i % 7 == 0:
            params |= {"ignore_eos": False}
        asked.append(request(f"r{i}", prompt, max_tokens=rng.randint(1, most), **params))
    return asked


async def tokens_of(router: Router, asked: Generate) -> list[int]:
    tokens, ends = [], 0
    async with router.open([asked]) as stream:
        async for delta in stream:
            assert delta.request_id == asked.request_id
            assert delta.remote is None
            tokens += delta.tokens
            ends += delta.finish_reason is not None
    assert ends == 1
    return tokens


async def all_of(router: Router, asked: list[Generate]) -> dict[str, list[int]]:
    answers = await asyncio.gather(*(tokens_of(router, each) for each in asked))
    return {each.request_id: tokens for each, tokens in zip(asked, answers, strict=True)}


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)


async def nothing_left(router: Router) -> None:
    """No request is known to anybody, and every block of every instance is free."""

    def empty() -> bool:
        reports = [member.client.stats for member in router.members]
        return router.in_flight == 0 and all(
            report is not None
            and report.num_free_blocks == report.num_blocks
            and report.num_running == report.num_waiting == report.leased_blocks == 0
            for report in reports
        )

    await until(empty)
    assert all(not member.loads for member in router.members)


def test_one_prefill_and_one_decode_instance_answer_200_requests_like_one_engine(tmp_path: Path) -> None:
    asked = seeded(200)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(1, 1, engine={"record_in": str(tmp_path)}) as router:
            assert await all_of(router, asked) == expected
            await nothing_left(router)
            assert router.stats.pulled_blocks > 500
            assert router.retried == 0

    run(scenario())
    recordings = sorted(tmp_path.iterdir())
    assert [path.name for path in recordings] == ["decode-1", "prefill-0"]
    for path in recordings:
        assert replay(path.read_text().splitlines()).requests > 100


def test_two_prefill_instances_answer_200_requests_like_one_engine_while_others_join_and_drain() -> None:
    asked = seeded(200, seed=1)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(2, 1, policy=Policy(prefill=shortest_queue, local_tokens=6)) as router:
            first = asyncio.create_task(all_of(router, asked[:120]))
            joined = [router.members.join("decode"), router.members.join("prefill")]
            await until(lambda: all(router.members[name].open for name in joined))
            second = asyncio.create_task(all_of(router, asked[120:]))
            await asyncio.sleep(0.05)
            await asyncio.gather(router.members.drain("decode-2"), router.members.drain("prefill-0"))
            assert sorted(member.name for member in router.members) == [
                "decode-3",
                "prefill-1",
                "prefill-4",
            ]
            assert await first | await second == expected
            await nothing_left(router)
            assert router.retried == 0

    run(scenario())


def test_when_an_instance_says_nothing_more_its_requests_go_on_elsewhere() -> None:
    asked = seeded(20, seed=3, most=30)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(1, 2, stall_s=3.0, restarts=0) as router:
            running = asyncio.create_task(all_of(router, asked))
            member = router.members["decode-1"]
            await until(lambda: len(member.loads) > 2 and router.stats.generation_tokens > 10)
            os.kill(member.client.pid, signal.SIGSTOP)
            assert await running == expected
            assert router.retried > 0
            assert [each.name for each in router.members] == ["prefill-0", "decode-2"]
            await nothing_left(router)

    run(scenario())


def test_aborts_at_any_moment_leave_nothing_behind() -> None:
    asked = seeded(60, seed=4, most=30)

    async def some_of(router: Router, each: Generate, count: int) -> None:
        async with aclosing(deltas_of(router, each)) as deltas:
            async for _ in deltas:
                count -= 1
                if count <= 0:
                    return

    async def scenario() -> None:
        async with fleet(1, 1) as router:
            tasks = [asyncio.create_task(some_of(router, each, i % 4)) for i, each in enumerate(asked)]
            for task in tasks[::5]:
                await asyncio.sleep(0.01)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await nothing_left(router)

    run(scenario())


async def deltas_of(router: Router, asked: Generate) -> AsyncIterator:
    async with router.open([asked]) as stream:
        async for delta in stream:
            yield delta


def test_what_can_never_be_served_is_refused_and_the_end_of_all_instances_is_said() -> None:
    async def scenario() -> None:
        async with fleet(1, 1, restarts=0) as router:
            with pytest.raises(AdmissionError, match="max_model_len"):
                await tokens_of(router, request("long", [5] * 5000, max_tokens=4))
            with pytest.raises(ServeError, match=r"no instance 'decode-9'\. There are: prefill-0"):
                await router.members.drain("decode-9")
            unseeded = request("u", [5, 6, 7], max_tokens=5, temperature=1.0)
            assert len(await tokens_of(router, unseeded)) == 5
            asked = request("slow", range(2, 30), max_tokens=400)
            running = asyncio.create_task(tokens_of(router, asked))
            await until(lambda: router.stats.num_running > 0)
            for member in router.members:
                os.kill(member.client.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="was killed by signal 9"):
                await running
            await until(lambda: len(router.members) == 0)
            assert "no instance is left" in router.trouble
            with pytest.raises(EngineDeadError, match="no instance is left"):
                router.open([request("late", [5])])

    run(scenario())


def roles(router: Router) -> dict[str, str]:
    return {member.name: member.role for member in router.members}


def test_instances_that_change_their_role_under_load_keep_their_process_and_every_token() -> None:
    asked = seeded(80, seed=5, most=24)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(2, 2) as router:
            pids = {member.name: member.client.pid for member in router.members}
            running = asyncio.create_task(all_of(router, asked))
            for name, role in (("prefill-0", "decode"), ("decode-2", "prefill"), ("prefill-0", "prefill")):
                await until(lambda name=name: len(router.members[name].loads) > 1 or running.done())
                assert await router.members.turn(name, role)
                assert router.members[name].open
            assert await running == expected
            assert roles(router) == {
                "prefill-0": "prefill",
                "prefill-1": "prefill",
                "decode-2": "prefill",
                "decode-3": "decode",
            }
            assert {member.name: member.client.pid for member in router.members} == pids
            assert router.retried == 0
            await nothing_left(router)

    run(scenario())


def test_the_last_of_a_role_keeps_it_and_one_that_dies_on_the_way_does_not_change() -> None:
    asked = seeded(12, seed=6, most=30)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(2, 1, restarts=0, engine={"patience_s": 1.0}) as router:
            assert not await router.members.turn("decode-2", "prefill")
            assert router.members["decode-2"].open
            slow = asyncio.create_task(tokens_of(router, request("slow", range(2, 9), max_tokens=100)))
            pid = router.members["prefill-0"].client.pid
            os.kill(pid, signal.SIGSTOP)  # or it could have answered, and turned, before it dies
            running = asyncio.create_task(all_of(router, asked))
            await until(lambda: bool(router.members["prefill-0"].loads))
            turning = asyncio.create_task(router.members.turn("prefill-0", "decode"))
            await asyncio.sleep(0)
            assert not router.members["prefill-0"].open
            os.kill(pid, signal.SIGKILL)
            assert not await turning
            assert await running == expected
            await until(lambda: roles(router) == {"prefill-1": "prefill", "decode-2": "decode"})
            assert not await router.members.turn("prefill-1", "decode")
            assert len(await slow) == 100
            await nothing_left(router)

    run(scenario())


def test_the_most_urgent_of_those_that_wait_is_placed_first_and_of_equals_the_first() -> None:
    async def scenario() -> None:
        async with fleet(0, 1, engine={"num_blocks": 20}) as router:
            placed: list[str] = []

            async def one(name: str, priority: int, length: int = 40) -> None:
                asked = request(name, range(2, 2 + length), max_tokens=8, priority=priority)
                async with router.open([asked]) as stream:
                    await anext(stream)
                    placed.append(name)
                    async for _ in stream:
                        pass

            kinds = {
                "whole": (0, 60),
                "late": (5,),
                "first": (0,),
                "second": (0,),
                "left": (-9,),
                "urgent": (-1,),
            }
            tasks = {}
            for name, what in kinds.items():
                tasks[name] = asyncio.create_task(one(name, *what))
                await asyncio.sleep(0)
            tasks["left"].cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            assert placed == ["whole", "urgent", "first", "second", "late"]
            await nothing_left(router)

    run(scenario())


def samples_by_role(router: Router) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for family in FleetCollector("nano", router).collect():
        for sample in family.samples:
            if set(sample.labels) == {"model_name", "role"}:
                found.setdefault(sample.name, {})[sample.labels["role"]] = sample.value
    return found


class Shift:
    """Asks for one thing after another, so many at a time, until told otherwise."""

    def __init__(self, router: Router, kind: str, prompt_len: int, max_tokens: int) -> None:
        self.asked: list[Generate] = []
        self.found: dict[str, list[int]] = {}
        self._router = router
        self._next = self._requests(kind, prompt_len, max_tokens)
        self._over = False

    def _requests(self, kind: str, prompt_len: int, max_tokens: int) -> Iterator[Generate]:
        rng = random.Random(kind)  # noqa: S311 (not a secret)
        while True:
            prompt = [rng.randrange(2, 60) for _ in range(rng.randint(prompt_len // 2, prompt_len))]
            made = request(
                f"{kind}{len(self.asked)}",
                prompt,
                max_tokens=rng.randint(max_tokens // 2, max_tokens),
                temperature=1.0,
                seed=rng.randrange(1 << 60),
            )
            self.asked.append(made)
            yield made

    async def _user(self) -> None:
        while not self._over:
            asked = next(self._next)
            self.found[asked.request_id] = await tokens_of(self._router, asked)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Keep 12 requests going until the condition holds, and end them; all answers are one engine's."""
        users = [asyncio.create_task(self._user()) for _ in range(12)]
        await until(condition, 90.0)
        self._over = True
        await asyncio.gather(*users)
        assert self.found == await asyncio.to_thread(colocated, self.asked)


def test_a_fleet_follows_a_shift_to_long_outputs_and_back_and_every_token_is_one_engines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="benthic.serve.router")
    config = ReplanConfig(max_num_batched_tokens=64, max_num_seqs=8, window_s=1.0, dwell_s=1.5)

    async def scenario() -> None:
        async with fleet(2, 1, replan=config, engine={"num_blocks": 512}) as router:
            changes = router.replanning.changes
            await Shift(router, "long-output", 12, 120).until(lambda: changes["decode"] == 1)
            assert sorted(roles(router).values()) == ["decode", "decode", "prefill"]
            await Shift(router, "long-prompt", 220, 2).until(lambda: changes["prefill"] == 1)
            assert sorted(roles(router).values()) == ["decode", "prefill", "prefill"]
            assert router.retried == 0
            found = samples_by_role(router)
            assert found["benthic:role_instances"] == {"prefill": 2.0, "decode": 1.0}
            assert found["benthic:role_changes_total"] == {"prefill": 1.0, "decode": 1.0}
            await nothing_left(router)

    run(scenario())
    said = [record.message for record in caplog.records if " is to " in record.message]
    assert "with 1P2D instead of 2P1D the busier role is" in said[0]
    assert "with 2P1D instead of 1P2D the busier role is" in said[1]
