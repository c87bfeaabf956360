"""Blocks of a prompt move while the prefill instance computes the rest: one engine's tokens, nothing left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import forked_instances
import pytest
from small_engine import is_empty, request
from small_fleet import colocated, pair, replace_params
from test_router import all_of, fleet, nothing_left, run, tokens_of, until

from benthic.sched.replay import replay
from benthic.serve.ahead import Ahead
from benthic.serve.fleet_metrics import FleetCollector
from benthic.serve.messages import Delta, MoreReady, PullEarly

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from small_fleet import Pair

    from benthic.serve.instance import Instance
    from benthic.serve.messages import Generate
    from benthic.serve.router import Router

PROMPT = list(range(20, 70))
CHUNKED = {"max_num_batched_tokens": 8}


class Direct:
    """In place of the pipe to the decode instance."""

    def __init__(self, reader: Instance) -> None:
        self.reader = reader

    def post(self, message: PullEarly | MoreReady) -> None:
        if isinstance(message, PullEarly):
            self.reader.pull_early(message.request)
        else:
            self.reader.more_ready(message.request_id, message.num_tokens)

    def release(self, name: str) -> None:
        self.reader.abort(name)


def work_off(reader: Instance) -> None:
    limit = time.monotonic() + 20
    while reader.has_work:
        assert time.monotonic() < limit, "the decode side makes no progress"
        reader.step()


def prefilled_early(
    both: Pair, asked: Generate, *, each: Callable[[int], None] = lambda _: None
) -> tuple[Delta, list[int]]:
    """Compute a prompt while the reader pulls what is ready; its last delta, and what was ready when."""
    ahead, ready = Ahead(Direct(both.reader), asked), []
    both.owner.add(replace_params(asked, max_tokens=1, hold=True, lend=True))
    while both.owner.has_work:
        for delta in both.owner.step():
            if delta.finish_reason is not None:
                ahead.stop()
                return delta, ready
            ahead.tell(delta.remote)
            ready.append(delta.remote.num_tokens)
            each(len(ready))
            work_off(both.reader)
    raise AssertionError


def all_empty(both: Pair) -> bool:
    both.settle()
    both.owner.step()
    work_off(both.reader)
    lent = both.owner._told or both.reader._reader._incoming or both.owner._desk._open
    return not lent and all(is_empty(each) for each in (both.owner, both.reader))


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.2}])
def test_all_but_the_last_chunk_of_a_prompt_has_come_when_its_first_token_is_there(params: dict) -> None:
    asked = request("a", PROMPT, max_tokens=12, **params)
    with pair(owner=CHUNKED) as both:
        first, ready = prefilled_early(both, asked)
        assert ready == [8, 16, 24, 32, 40, 48]
        assert both.reader.stats().early_blocks == both.reader.stats().pulled_blocks == 12
        assert both.decode(asked, first) == colocated([asked])["a"]
        assert both.reader.stats().pulled_blocks == 13
        assert all_empty(both)


def test_a_reader_without_a_prefix_cache_pulls_at_the_end() -> None:
    asked = request("a", PROMPT, max_tokens=12)
    with pair(owner=CHUNKED, reader={"enable_prefix_caching": False}) as both:
        first, _ = prefilled_early(both, asked)
        assert both.decode(asked, first) == colocated([asked])["a"]
        assert (both.reader.stats().early_blocks, both.reader.stats().pulled_blocks) == (0, 13)
        assert all_empty(both)


def test_a_reader_that_is_full_pulls_what_fits_and_the_rest_at_the_end() -> None:
    asked, other = request("a", PROMPT, max_tokens=6), request("b", range(100, 130), max_tokens=1)
    with pair(owner=CHUNKED, reader={"num_blocks": 16}) as both:
        held = both.reader.engine.parts.scheduler._residency.pool
        taken = [held.take() for _ in range(9)]
        first, _ = prefilled_early(both, asked)
        assert both.reader.stats().early_blocks > 0
        held.give_back(taken)
        assert both.decode(asked, first) == colocated([asked])["a"]
        both.reader.add(other)
        work_off(both.reader)
        assert all_empty(both)


def test_what_was_read_of_a_prompt_that_is_preempted_does_not_count() -> None:
    asked = request("a", PROMPT, max_tokens=12)
    with pair(owner=CHUNKED) as both:
        scheduler = both.owner.engine.parts.scheduler

        def preempt(turn: int) -> None:
            """The blocks become somebody else's when they are to be read; the reader is not told."""
            if turn == 3:
                scheduler._making_room.preempt(scheduler._requests["a"])
                scheduler.reset_prefix_cache()
                both.owner._take_back()
                both.owner.engine.parts.runner.cache.pages_LPBW.fill_(9.0)

        first, ready = prefilled_early(both, asked, each=preempt)
        assert ready == [8, 16, 24], "it is not lent again"
        assert both.reader.stats().early_blocks == 4
        assert both.decode(asked, first) == colocated([asked])["a"]
        assert all_empty(both)


@pytest.mark.parametrize("side", ["owner", "reader"])
def test_an_abort_in_the_middle_of_a_prompt_frees_both_sides(side: str) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair(owner=CHUNKED) as both:
        ahead = Ahead(Direct(both.reader), asked)
        both.owner.add(replace_params(asked, max_tokens=1, hold=True, lend=True))
        ahead.tell(both.owner.step()[0].remote)
        if side == "owner":
            both.owner.abort("a")
            work_off(both.reader)
        else:
            both.reader.step()
            ahead.stop()
            both.owner.abort("a")
        ahead.stop()
        assert all_empty(both)


def test_a_prompt_whose_first_token_ends_it_leaves_nothing_lent() -> None:
    asked = request("a", PROMPT, max_tokens=6)
    (stop, *_) = colocated([asked])["a"]
    ends = request("a", PROMPT, max_tokens=6, stop_token_ids=(stop,))
    with pair(owner=CHUNKED) as both:
        last, _ = prefilled_early(both, ends)
        assert (last.finish_reason, last.remote) == ("stop", None)
        assert all_empty(both)


def test_deltas_that_wait_to_be_read_keep_what_the_first_token_says() -> None:
    with pair(owner=CHUNKED) as both:
        both.owner.add(replace_params(request("a", PROMPT), max_tokens=1, hold=True, lend=True))
        deltas = []
        while both.owner.has_work:
            deltas += both.owner.step()
        *lent, last = deltas
        assert len(lent) == 6
        assert lent[0].then(lent[1]).then(last) == last


# --- instances in processes of their own

LENGTH = 240
SLOW = {"max_num_batched_tokens": 8, "chunk_s": 0.03}
"""A prompt of 30 chunks takes a second."""


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benthic.serve.client.start_engine", forked_instances.start_engine)


def long_prompts(count: int) -> list[Generate]:
    """Prompts of many chunks that have nothing in common."""
    return [
        request(
            f"r{i}",
            [2 + (i * 37 + place * place) % 311 for place in range(LENGTH)],
            max_tokens=12,
            temperature=float(i % 2),
            seed=i,
        )
        for i in range(count)
    ]


def early_blocks(router: Router) -> int:
    return 0 if router.stats is None else router.stats.early_blocks


@pytest.mark.usefixtures("_forked")
def test_most_blocks_of_long_prompts_are_pulled_before_their_end_by_a_process_of_its_own(
    tmp_path: Path,
) -> None:
    asked = long_prompts(4)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(1, 1, engine=SLOW | {"record_in": str(tmp_path)}) as router:
            assert await all_of(router, asked) == expected
            await nothing_left(router)
            columns = len(asked) * LENGTH // 4
            assert router.stats.pulled_blocks == columns
            assert router.stats.early_blocks > columns * 0.9
            samples = [s for family in FleetCollector("nano", router).collect() for s in family.samples]
            found = [s.value for s in samples if s.name == "benthic:instance_kv_blocks_pulled_early_total"]
            assert sum(found) == router.stats.early_blocks

    run(scenario())
    for path in sorted(tmp_path.iterdir()):
        totals = replay(path.read_text().splitlines()).totals
        assert totals.early_blocks > 0 or path.name == "prefill-0"


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_when_either_side_dies_in_the_middle_of_a_long_prompt_it_goes_on_elsewhere(
    victim: str, blow: signal.Signals
) -> None:
    asked = long_prompts(4)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(2, 2, engine=SLOW | {"patience_s": 1.0}, stall_s=2.0, restarts=0) as router:
            running = asyncio.create_task(all_of(router, asked))
            await until(lambda: early_blocks(router) > 8)
            member = max((m for m in router.members if m.role == victim), key=lambda m: len(m.loads))
            assert router.stats.generation_tokens == 0, "the prompts are not over"
            os.kill(member.client.pid, blow)
            assert await running == expected
            assert router.retried > 0
            await until(lambda: len(router.members) == 3)
            await nothing_left(router)

    run(scenario())


@pytest.mark.usefixtures("_forked")
def test_clients_that_leave_in_the_middle_of_a_long_prompt_leave_nothing_behind() -> None:
    asked = long_prompts(4)
    again = replace_params(asked[0], request_id="again")
    expected = colocated([again])["again"]

    async def scenario() -> None:
        async with fleet(1, 1, engine=SLOW) as router:
            tasks = [asyncio.create_task(tokens_of(router, each)) for each in asked]
            await until(lambda: early_blocks(router) > 8)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await nothing_left(router)
            assert await tokens_of(router, again) == expected
            await nothing_left(router)

    run(scenario())
