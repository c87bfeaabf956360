"""Processes that share the requests of a run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from canned_server import TTFT_S, Canned, running
from made import sample

from benthic.bench.client import Target, connect
from benthic.bench.crew import Crew, Part, divided, merged, shared
from benthic.bench.load import Load, Run
from benthic.bench.workload import Work
from benthic.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from benthic.bench.samples import Sample

TARGET = "http://127.0.0.1"
BENCH = (sys.executable, "-m", "benthic", "bench", "serve", "--num-clients")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Canned]]:
    with running() as started:
        yield started


def works(*tokens: int) -> list[Work]:
    return [Work(prompt=(i, 2, 3), output_tokens=each) for i, each in enumerate(tokens)]


def with_load(
    url: str,
    count: int,
    use: Callable[[Load | Crew], Awaitable[Run]],
    *,
    bound: int | None = None,
    on_done: Callable[[int], None] = lambda _: None,
) -> Run:
    """What `use` makes of a load of `count` processes."""

    async def scenario() -> Run:
        target, clock = Target(base_url=url, api="openai", model="canned"), time.perf_counter
        async with connect(target, clock) as client:
            alone = Load(send=client.send, clock=clock, max_concurrency=bound, on_done=on_done)
            with shared(alone, target, count) as load:
                return await use(load)

    return asyncio.run(scenario())


def alive(pid: int) -> bool:
    """Whether it runs still (a zombie that nobody waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def part(samples: Sequence[Sample], late_s: Sequence[float] = (), busy: float = 0.1) -> Part:
    return Part.of(Run(samples=tuple(samples), late_s=late_s, busy=busy))


def test_merged_parts_are_the_samples_of_the_schedule() -> None:
    samples = [
        sample((i + 0.5, 1), *((i + 0.6 + j / 10, 2) for j in range(i % 3)), due=float(i)) for i in range(7)
    ]
    samples[4] = sample(due=4.0, error="HTTP 503")
    run = merged([part(samples[i::3]) for i in range(3)])
    assert run.samples == tuple(samples)


def test_lags_of_all_processes_are_one_and_the_busiest_gives_the_cpu() -> None:
    punctual = [sample((1.0, 1), due=0.5, sent=0.5)] * 3
    late = [sample((1.0, 1), due=0.5, sent=0.7)] * 2
    lag = merged([part(punctual, [0.0, 0.1], 0.2), part(late, [0.3], 0.9)]).lag
    assert (lag.send_p50, lag.send_max) == pytest.approx((0.0, 0.2))
    assert (lag.loop_max, lag.cpu) == pytest.approx((0.3, 0.9))
    assert "--num-clients" in lag.limited(0.02)


@pytest.mark.parametrize(
    ("bound", "count", "slots"),
    [(None, 3, [None] * 3), (7, 3, [3, 2, 2]), (2, 3, [1, 1]), (3, 3, [1, 1, 1])],
)
def test_slots_are_divided_and_nobody_has_none(bound: int | None, count: int, slots: list) -> None:
    assert divided(bound, count) == slots


def test_one_client_is_the_load_of_this_process() -> None:
    alone = Load(send=None, clock=time.perf_counter)
    with shared(alone, Target(base_url=TARGET, api="openai", model="canned"), 1) as load:
        assert load is alone


def test_three_clients_do_what_one_does(server: tuple[str, Canned]) -> None:
    asked, at_s = works(3, 1, 4, 2, 5, 3, 1, 2), tuple(i * 0.04 for i in range(8))
    done: list[int] = []

    async def twice(load: Load | Crew) -> Run:
        first = await load.open_loop(asked, at_s)
        second = await load.open_loop(asked, at_s)
        assert [each.answer.output_tokens for each in first.samples] == [
            each.answer.output_tokens for each in second.samples
        ]
        return second

    one = with_load(server[0], 1, twice)
    three = with_load(server[0], 3, twice, on_done=done.append)
    assert sum(done) == 2 * len(asked)
    for run in (one, three):
        assert [each.answer.error for each in run.samples] == [None] * 8
        assert [each.answer.output_tokens for each in run.samples] == [3, 1, 4, 2, 5, 3, 1, 2]
        assert [sum(part.tokens for part in each.answer.deliveries) for each in run.samples] == [
            work.output_tokens for work in asked
        ]
        began = run.samples[0].origin_s
        assert [each.origin_s - began for each in run.samples] == pytest.approx(at_s)
        assert all(each.send_lag_s > -0.002 for each in run.samples)  # uvloop's timers count milliseconds
        assert all(each.latencies.ttft_s >= TTFT_S for each in run.samples)


def test_no_more_are_in_flight_than_is_said_in_all(server: tuple[str, Canned]) -> None:
    server[1].most_in_flight = 0
    run = with_load(server[0], 3, lambda load: load.closed_loop(works(*[3] * 20)), bound=4)
    assert len(run.samples) == 20
    assert server[1].most_in_flight == 4
    server[1].most_in_flight = 0
    run = with_load(server[0], 3, lambda load: load.open_loop(works(*[3] * 12), [0.0] * 12), bound=2)
    assert server[1].most_in_flight == 2
    assert len({round(each.origin_s, 6) for each in run.samples}) == 1  # a wait for a slot is latency
    assert max(each.ready_s - each.origin_s for each in run.samples) > TTFT_S


def test_a_client_process_that_is_killed_ends_the_run_and_leaves_no_other(server: tuple[str, Canned]) -> None:
    pids, killed_at = [], []

    async def use(load: Crew) -> Run:
        pids.extend(helper.process.pid for helper in load.helpers)
        run = asyncio.create_task(load.open_loop(works(*[2000] * 6), [0.0] * 6))
        while server[1].in_flight < 6:
            await asyncio.sleep(0.02)
        os.kill(pids[1], signal.SIGKILL)
        killed_at.append(time.monotonic())
        return await run

    with pytest.raises(ServeError, match=r"client process 2 of 3 ended with status -9"):
        with_load(server[0], 3, use)
    assert time.monotonic() - killed_at[0] < 5.0
    assert not any(alive(pid) for pid in pids)


def test_a_client_process_that_raises_ends_the_run(
    server: tuple[str, Canned], capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = [Work(prompt=(1, 2), output_tokens=object())] * 2  # not to be had as JSON
    with pytest.raises(ServeError, match=r"client process \d of 2 ended with status 1"):
        with_load(server[0], 2, lambda load: load.open_loop(wrong, (0.0, 0.0)))
    assert "TypeError" in capfd.readouterr().err


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_client_process_outlives_the_command(
    server: tuple[str, Canned], tmp_path: Path, ending: signal.Signals
) -> None:
    server[1].bodies.clear()
    command = [*BENCH, "2", "--base-url", server[0]]
    command += ["--vocab-size", "99", "--random-input-len", "4", "--random-output-len", "2000"]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        [*command, "--num-prompts", "8", "--num-warmups", "0"], stdout=log, stderr=log
    ) as main:
        deadline = time.monotonic() + 60.0
        while len(server[1].bodies) < 8 and main.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
        main.send_signal(ending)
        main.wait(20)
    log.close()
    assert len(server[1].bodies) == 8, (tmp_path / "log").read_text()
    assert len(children) >= 2
    gone_by = time.monotonic() + 5.0
    while any(alive(int(pid)) for pid in children) and time.monotonic() < gone_by:
        time.sleep(0.02)
    assert not any(alive(int(pid)) for pid in children)


def test_a_command_with_clients_measures_and_says_how_many(
    server: tuple[str, Canned], tmp_path: Path
) -> None:
    result = tmp_path / "r.json"
    command = [*BENCH, "2", "--base-url", server[0]]
    command += ["--vocab-size", "99", "--random-input-len", "4", "--random-output-len", "3"]
    command += ["--num-prompts", "5", "--max-client-lag", "100000", "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(result.read_text())
    assert record["settings"]["num_clients"] == 2
    assert (record["runs"][0]["completed"], record["runs"][0]["total_output_tokens"]) == (5, 15)


def test_no_clients_at_all_are_refused() -> None:
    done = subprocess.run([*BENCH, "0"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--num-clients" in done.stderr
