"""Fronts: requests and tokens in order of arrival, tokens that wait go out together, measured costs."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque

import pytest

from benthic.errors import ConfigError, DataError
from benthic.plan.serving.cluster import Cluster
from benthic.plan.serving.demand import Ask
from benthic.plan.serving.fronts import FREE, Front, FrontCost
from benthic.plan.serving.group import GroupSpec
from benthic.plan.serving.measured import read_front
from benthic.sched.plans import BatchingConfig

COST = FrontCost(request_s=2e-3, prompt_token_s=1e-6, write_s=1e-4, token_s=2e-5)


class EveryStream:
    """A front told stream by stream, as `serve/streams` is: what `Front` counts, spelled out."""

    def __init__(self) -> None:
        self.queue: deque[tuple[object, float]] = deque()
        self.tokens: dict[object, int] = {}
        self.free_s = 0.0

    def advance(self, now: float) -> None:
        while self.queue:
            stream, came = self.queue[0]
            took = (
                COST.request_s + 1e-3 if stream is None else COST.write_s + COST.token_s * self.tokens[stream]
            )
            begins = max(self.free_s, came)
            if begins >= now:
                return
            self.free_s = begins + took
            self.queue.popleft()
            self.tokens.pop(stream, None)

    def come(self, now: float, streams: list[object]) -> None:
        self.advance(now)
        for stream in streams:
            if stream is not None and stream in self.tokens:
                self.tokens[stream] += 1
            else:
                self.queue.append((stream, now))
                self.tokens[stream] = 1

    def ends(self) -> float:
        self.advance(float("inf"))
        return self.free_s


@pytest.mark.parametrize("gap_s", [0.03, 0.011, 0.008, 0.006])
def test_a_front_counts_as_one_that_knows_every_stream_does(gap_s):
    rng = random.Random(0)  # noqa: S311 (a test)
    counted, spelled = Front(COST), EveryStream()
    for step in range(200):
        now = step * gap_s + rng.random() * 1e-4
        if step % 5 == 0:
            counted.take(now, 1000)
            spelled.come(now, [None])
        owner = step % 2
        counted.write(now, owner, 80)
        spelled.come(now, [(owner, stream) for stream in range(80)])
    assert counted.free_at(now) == pytest.approx(spelled.ends(), rel=0.02)


def test_a_front_that_is_behind_writes_several_tokens_at_a_time_and_falls_no_further_behind():
    front, late = Front(COST), []
    for step in range(300):  # 100 writes of 0.1 ms each 5 ms: twice what it can do one by one
        front.write(0.005 * step, "engine", 100)
        late.append(front.free_at(0.005 * step) - 0.005 * step)
    assert late[0] == pytest.approx(100 * 1.2e-4)
    assert max(late) < 3 * late[0]
    assert late[-1] == pytest.approx(late[150], rel=0.1)


def test_new_streams_find_nothing_of_theirs_waiting():
    front = Front(COST)
    front.write(0.0, "engine", 100)
    front.write(0.0, "engine", 100)
    assert front.free_at(0.0) == pytest.approx(100 * COST.write_s + 200 * COST.token_s)
    front.write(0.0, "engine", 10, first=10)
    assert front.free_at(0.0) == pytest.approx(110 * COST.write_s + 210 * COST.token_s)
    front.write(0.0, "another", 1)
    assert front.free_at(0.0) == pytest.approx(111 * COST.write_s + 211 * COST.token_s)
    assert front.busy_s == pytest.approx(front.free_at(0.0))


def one(fronts: int, cost: FrontCost, asks: list[Ask]) -> list[tuple[float, float]]:
    batching = BatchingConfig(
        num_blocks=4096, block_size=16, max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=8192,
        enable_prefix_caching=False, counted=True,
    )  # fmt: skip
    spec = GroupSpec(batching=batching, step=lambda _: 0.01)
    outcome = Cluster([spec], front=cost, fronts=fronts).play(asks)
    return [(served.ttft_s, served.tpot_s or 0.0) for served in outcome.served]


def test_a_request_waits_for_its_front_on_both_ways():
    ((ttft, tpot),) = one(1, COST, [Ask(1.0, 1000, 11)])
    assert ttft == pytest.approx(COST.request_s + 1e-3 + 0.01 + COST.write_s + COST.token_s)
    assert tpot == pytest.approx(0.01)
    ((free, _),) = one(1, FREE, [Ask(1.0, 1000, 11)])
    assert free == pytest.approx(0.01)


def test_more_fronts_bring_first_tokens_sooner():
    asks = [Ask(0.004 * place, 100, 100) for place in range(250)]
    waits = [sum(ttft for ttft, _ in one(fronts, COST, asks)) / len(asks) for fronts in (1, 2, 4)]
    assert all(late > 1.3 * sooner for late, sooner in itertools.pairwise(waits))
    assert waits[0] > 2.5 * waits[-1]


def test_the_way_to_an_engine_keeps_no_front_busy_and_is_longer_by_the_main_process():
    cost = FrontCost(way_s=0.1, hub_s=0.05)
    asks = [Ask(1.0, 1000, 11), Ask(1.001, 1000, 11)]
    for fronts, way_s in ((1, 0.1), (2, 0.15)):
        without, found = one(fronts, FREE, asks), one(fronts, cost, asks)
        assert [ttft - way_s for ttft, _ in found] == pytest.approx([ttft for ttft, _ in without])
        assert [tpot for _, tpot in found] == pytest.approx([tpot for _, tpot in without])
    slow = FrontCost(way_s=0.1, hub_s=0.05, write_s=1.0).slower(3.0)
    assert (slow.way_s, slow.hub_s, slow.write_s) == (0.1, 0.05, 3.0), "fewer fronts are no farther"


def test_no_front_and_times_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="1 instances and 0 fronts"):
        one(0, COST, [])
    with pytest.raises(ConfigError, match="write_s is -1"):
        FrontCost(write_s=-1.0)


def test_costs_are_read_from_what_was_measured(tmp_path):
    path = tmp_path / "front.json"
    writes = [{"fronts": 1, "events_a_token": e, "cpu_us_a_token": 100 * e + 20} for e in (1.0, 0.5, 0.2)]
    asked = [{"fronts": 1, "prompt_tokens": n, "cpu_us_a_request": 900 + 0.5 * n} for n in (10, 1000)]
    many = [{"fronts": 2, "events_a_token": 1.0, "cpu_us_a_token": 9999}]
    path.write_text(json.dumps({"rows": [*writes, *asked, *many]}))
    cost = read_front([path])
    assert cost.write_s == pytest.approx(100e-6)
    assert cost.token_s == pytest.approx(20e-6)
    assert cost.prompt_token_s == pytest.approx(0.5e-6)
    assert cost.request_s == pytest.approx(900e-6 - 120e-6), "the one token that it was answered with"
    assert cost.way_s == cost.hub_s == 0.0
    own = {n: 0.9 + 0.5e-3 * n for n in (10, 1000)}  # ms
    ways = [
        {"fronts": fronts, "prompt_tokens": n, "ms_a_first_token": own[n] + way + (0.3 if n == 10 else -0.3)}
        for fronts, way in ((1, 2.0), (4, 2.6))
        for n in own
    ]
    path.write_text(json.dumps({"rows": [*writes, *asked, *many, *ways]}))
    far = read_front([path])
    assert (far.way_s, far.hub_s) == pytest.approx((2.0e-3, 0.6e-3))
    assert far.write_s == cost.write_s, "rows of another kind"
    path.write_text(json.dumps({"rows": writes}))
    with pytest.raises(DataError, match="3 different events_a_token and 0 different prompt_tokens"):
        read_front([path])
    with pytest.raises(DataError, match=r"no file .* benchmarks/front\.py"):
        read_front([tmp_path / "none.json"])
