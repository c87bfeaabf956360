"""The live rule in simulated fleets whose load shifts: roles follow and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from made_up import Affine, LogNormal

from benthic.plan.serving.cluster import Cluster, Link
from benthic.plan.serving.demand import drawn
from benthic.plan.serving.group import GroupSpec
from benthic.sched.plans import BatchingConfig
from benthic.sched.replan import ReplanConfig, Replanner, Report, Split
from benthic.sched.routing import Query, Route, choose
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from benthic.plan.serving.cluster import Journey
    from benthic.plan.serving.demand import Demand
    from benthic.plan.serving.group import Lane
    from benthic.sched.replan import Change

BATCHING = BatchingConfig(
    num_blocks=2000,
    block_size=64,
    max_model_len=8192,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    counted=True,
)
STEP = Affine(fixed=0.010, token=5e-5, sequence=2e-4, context=1e-7)
LINK = Link(block_bytes=4e6, bytes_per_second=200e9, latency_s=1e-4)
TARGETS = Objectives(ttft_s=1.0, tpot_s=0.040)


class Replanned(Cluster):
    """A simulated fleet that looks at itself as the router does, until `until_s`."""

    def watch(self, config: ReplanConfig, until_s: float) -> list[tuple[float, Change]]:
        """Change roles while it plays; returns where the changes will be."""
        self.turning: dict[str, Change] = {}
        self.found: list[tuple[float, Change]] = []
        self.replanner = Replanner(config)
        self._look(config.look_s, until_s)
        return self.found

    def _look(self, every_s: float, until_s: float) -> None:
        for name, change in tuple(self.turning.items()):
            if not self._lanes[name].loads:
                self._lanes[name].role = change.role
                del self.turning[name]
                self._place_waiting()
        change = self.replanner.observe(self.now, [self._report(lane) for lane in self._lanes.values()])
        if change is not None:
            self.turning[change.name] = change
            self.found.append((self.now, change))
        if self.now < until_s:
            self._at(self.now + every_s, lambda: self._look(every_s, until_s))

    def _report(self, lane: Lane) -> Report:
        totals, scheduler = lane.scheduler.totals, lane.scheduler
        return Report(
            name=lane.name,
            role=lane.role,
            steady=lane.name not in self.turning,
            num_requests=len(lane.loads),
            queued_tokens=lane.queued_tokens,
            num_waiting=scheduler.num_waiting,
            used_share=1.0 - scheduler.num_free_blocks / scheduler.config.num_blocks,
            steps=totals.steps,
            step_seconds=lane.group.busy_s,
            computed_tokens=totals.scheduled_tokens,
            rows=totals.generated_tokens,
            tokens=totals.generated_tokens,
        )

    def _choose(self, journey: Journey) -> Route | None:
        query = Query(journey.ask.prompt_tokens, decodes=journey.ask.output_tokens > 1)
        states = [replace(lane.state(), open=lane.name not in self.turning) for lane in self._lanes.values()]
        route = choose(query, states, self.policy)
        return route._replace(prefill=None) if route is not None and journey.alone else route


def fleet(prefill: int, decode: int) -> Replanned:
    roles = ["prefill"] * prefill + ["decode"] * decode
    return Replanned([GroupSpec(role=role, batching=BATCHING, step=STEP) for role in roles], link=LINK)


def after(first: Demand, second: Demand) -> Demand:
    """One demand behind the other."""
    start = first[-1].at_s
    return (*first, *[ask._replace(at_s=start + ask.at_s) for ask in second])


LONG_PROMPTS = LogNormal(prompt_tokens=3000, output_tokens=60, spread=0.4, most=8000)
LONG_ANSWERS = LogNormal(prompt_tokens=300, output_tokens=500, spread=0.4, most=8000)
RULE = ReplanConfig(
    max_num_batched_tokens=2048,
    max_num_seqs=64,
    window_s=15.0,
    dwell_s=60.0,
    ttft_s=TARGETS.ttft_s,
    tpot_s=TARGETS.tpot_s,
)


def test_a_fleet_that_follows_a_shift_is_done_sooner_and_meets_more_targets() -> None:
    demand = after(drawn(LONG_PROMPTS, 600, rate=8.0, seed=1), drawn(LONG_ANSWERS, 1500, rate=11.0, seed=2))
    shift_s = demand[599].at_s
    still, moving = fleet(3, 1), fleet(3, 1)
    changes = moving.watch(RULE, demand[-1].at_s)
    fixed, followed = still_played(still, demand), moving.play(demand)
    assert {change.role for at, change in changes if at > shift_s} == {"decode"}
    assert [change.after for _, change in changes] == [Split(2, 2), Split(1, 3)]
    assert len(followed.served) == len(fixed.served) == len(demand)
    for outcome in (fixed, followed):
        generated = sum(totals.generated_tokens for group in outcome.groups for totals in group.totals)
        assert generated == sum(ask.output_tokens for ask in demand)
    assert all(
        lane.scheduler.num_free_blocks == BATCHING.num_blocks and not lane.loads
        for lane in moving._lanes.values()
    )
    assert followed.attainment(TARGETS) > fixed.attainment(TARGETS)
    assert followed.end_s < 0.75 * fixed.end_s


def still_played(cluster: Replanned, demand: Demand):
    cluster.turning = {}
    return cluster.play(demand)


def test_a_steady_poisson_load_that_the_split_fits_moves_nobody() -> None:
    demand = drawn(LONG_ANSWERS, 2000, rate=11.0, seed=3)
    cluster = fleet(1, 3)
    changes = cluster.watch(RULE, demand[-1].at_s)
    cluster.play(demand)
    assert changes == []
    assert cluster.replanner.needs is not None
