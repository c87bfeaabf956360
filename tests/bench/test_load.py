from __future__ import annotations

import gc

import pytest
from made import FakeServer, jump

from benthic.bench.load import Load
from benthic.bench.samples import Answer
from benthic.bench.workload import Work
from benthic.errors import ServeError


def works(count: int, tokens: int = 3) -> list[Work]:
    return [Work(prompt=(1, 2, 3), output_tokens=tokens)] * count


def test_open_loop_sends_on_schedule_whatever_the_server_does() -> None:
    async def scenario(clock):
        server = FakeServer(clock, ttft_s=10.0, tpot_s=0.5)
        return await Load(send=server.send, clock=clock).open_loop(works(3), (0.0, 1.0, 2.5)), server

    run, server = jump(scenario)
    assert [each.answer.sent_s for each in run.samples] == pytest.approx([0.0, 1.0, 2.5])
    assert server.most_in_flight == 3
    for each in run.samples:
        assert each.latencies.ttft_s == pytest.approx(10.0)
        assert each.latencies.tpot_s == pytest.approx(0.5)
        assert each.latencies.e2e_s == pytest.approx(11.0)
    assert run.lag.send_max == pytest.approx(0.0)


def test_a_schedule_may_begin_at_a_moment_of_the_clock() -> None:
    async def scenario(clock):
        server = FakeServer(clock, ttft_s=1.0)
        return await Load(send=server.send, clock=clock).open_loop(works(2), (0.0, 1.0), began=5.0)

    samples = jump(scenario).samples
    assert [each.origin_s for each in samples] == pytest.approx([5.0, 6.0])
    assert [each.answer.sent_s for each in samples] == pytest.approx([5.0, 6.0])


def test_garbage_is_not_collected_within_a_run() -> None:
    collects = []

    async def scenario(clock):
        server = FakeServer(clock, ttft_s=1.0)

        async def send(work: Work) -> Answer:
            collects.append(gc.isenabled())
            return await server.send(work)

        return await Load(send=send, clock=clock).open_loop(works(2), (0.0, 1.0))

    enabled = gc.isenabled()
    jump(scenario)
    assert (collects, gc.isenabled()) == ([False, False], enabled)


def test_a_request_that_waits_for_its_slot_counts_from_the_moment_it_was_due() -> None:
    async def scenario(clock):
        server = FakeServer(clock, ttft_s=4.0)
        load = Load(send=server.send, clock=clock, max_concurrency=1)
        return await load.open_loop(works(2, tokens=1), (0.0, 1.0))

    first, second = jump(scenario).samples
    assert first.latencies.ttft_s == pytest.approx(4.0)
    assert second.answer.sent_s == pytest.approx(4.0)
    assert second.latencies.ttft_s == pytest.approx(7.0)
    assert second.send_lag_s == pytest.approx(0.0)


def test_a_queue_in_the_server_shows_in_ttft_as_in_md1() -> None:
    async def scenario(clock):
        server = FakeServer(clock, ttft_s=1.0, serial=True)
        return await Load(send=server.send, clock=clock).open_loop(works(3, tokens=1), (0.0, 0.25, 0.5))

    found = [each.latencies.ttft_s for each in jump(scenario).samples]
    assert found == pytest.approx([1.0, 1.75, 2.5])


def test_closed_loop_keeps_so_many_in_flight_and_no_more() -> None:
    async def scenario(clock):
        server = FakeServer(clock, ttft_s=1.0)
        run = await Load(send=server.send, clock=clock, max_concurrency=2).closed_loop(works(5, tokens=1))
        return run, server, clock()

    run, server, ended = jump(scenario)
    assert server.most_in_flight == 2
    assert ended == pytest.approx(3.0)
    assert [each.origin_s for each in run.samples] == pytest.approx([0.0, 0.0, 1.0, 1.0, 2.0])
    assert all(each.latencies.ttft_s == pytest.approx(1.0) for each in run.samples)


def test_a_client_that_blocks_its_loop_is_caught() -> None:
    async def scenario(clock):
        loop_clock = clock.__self__
        server = FakeServer(clock, ttft_s=0.5)

        async def send(work: Work) -> Answer:
            loop_clock.selector.now += 0.2  # as if building the request took 0.2 s of processor
            return await server.send(work)

        return await Load(send=send, clock=clock).open_loop(works(4, tokens=1), (0.0, 0.01, 0.02, 0.03))

    lag = jump(scenario).lag
    assert lag.send_max > 0.15
    assert "the client was late" in lag.limited(0.02)


def test_a_failed_warm_up_ends_the_test_with_the_servers_words() -> None:
    async def scenario(clock):
        async def send(work: Work) -> Answer:
            return Answer(sent_s=clock(), ended_s=clock(), error="HTTP 401: the API key is missing")

        await Load(send=send, clock=clock).warm_up(works(1))

    with pytest.raises(ServeError, match="warm-up request failed: HTTP 401"):
        jump(scenario)
