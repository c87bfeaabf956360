"""Ranks that step together, and the live engine's loop round their schedulers, with a clock that jumps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from benthic.errors import ConfigError
from benthic.plan.serving.steps import StepLoad, load_of
from benthic.sched.batching import Scheduler
from benthic.sched.pulls import AWAIT_S
from benthic.sched.routing import InstanceState, Role
from benthic.sched.tempo import Tempo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.plan.serving.acceptance import Acceptance
    from benthic.plan.serving.steps import StepTime
    from benthic.sched.plans import BatchingConfig, Finished, StepPlan

    MakeScheduler = Callable[[BatchingConfig], Scheduler]

NO_LOAD = StepLoad(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """One instance: a copy of the weights, whose `lanes` data-parallel attention ranks step together.

    Attributes:
        role: what it is kept for.
        batching: the scheduler of each rank; requests are counted, not spelled.
        step: seconds of a step.
        lanes: ranks with a scheduler of their own.
        depth: plans in flight; 2 plans a step while the one before runs, as the engine does on a GPU.
        late_s: margin of late planning (`benthic.sched.tempo`); None plans at once.
        stages: pipeline stages, equally long: the next step starts when the first of them is free.
        host_s: what the host needs before a step can start; hidden while the device is behind.
        prompt_host_s: what it needs besides, where a step has pieces of prompts.
        acceptance: of drafts; needed when `batching` speculates.
        make: gives the schedulers; a recording one lets a simulated run be replayed.
    """

    role: Role = "decode"
    batching: BatchingConfig
    step: StepTime
    lanes: int = 1
    depth: int = 2
    late_s: float | None = None
    stages: int = 1
    host_s: float = 0.0
    prompt_host_s: float = 0.0
    acceptance: Acceptance | None = None
    make: MakeScheduler = Scheduler

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.stages < 1 or self.depth < self.stages:
            msg = (
                f"an instance has lanes = {self.lanes}, stages = {self.stages} and depth = {self.depth}, but "
                "at least 1 lane and stage, and a plan for every stage, are needed"
            )
            raise ConfigError(msg)
        if self.late_s is not None and self.lanes > 1:
            msg = f"late_s = {self.late_s}, but {self.lanes} lanes step together and cannot each choose when"
            raise ConfigError(msg)
        if not self.batching.counted:
            msg = "a simulated instance has counted=False, but there are 0 token ids. Set counted=True."
            raise ConfigError(msg)
        if (self.batching.num_speculative_tokens > 0) != (self.acceptance is not None):
            has = "an" if self.acceptance is not None else "no"
            msg = (
                f"num_speculative_tokens = {self.batching.num_speculative_tokens}, but {has} acceptance "
                "model is given. Give one exactly when drafts are made."
            )
            raise ConfigError(msg)


class Assigned(NamedTuple):
    """What one request asks of one lane: prompt tokens to compute, and blocks."""

    queued_tokens: int
    blocks: int


@dataclass(eq=False)
class Lane:
    """One rank's scheduler, and what the router has assigned to it."""

    name: str
    role: Role
    scheduler: Scheduler
    group: Group
    loads: dict[str, Assigned] = field(default_factory=dict)
    queued_tokens: int = 0
    used_blocks: int = 0
    link_free_s: float = 0.0
    pulls_end_s: list[float] = field(default_factory=list)

    def state(self) -> InstanceState:
        """What the routing policy sees."""
        config = self.scheduler.config
        return InstanceState(
            name=self.name,
            role=self.role,
            open=True,
            num_requests=len(self.loads),
            queued_tokens=self.queued_tokens,
            used_blocks=self.used_blocks,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
        )

    def assign(self, request_id: str, queued_tokens: int, blocks: int) -> None:
        """Note what a request will ask."""
        self.loads[request_id] = Assigned(queued_tokens, blocks)
        self.queued_tokens += queued_tokens
        self.used_blocks += blocks

    def computed(self, request_id: str) -> None:
        """The prompt of a request is computed; its blocks stay assigned."""
        load = self.loads.get(request_id)
        if load is not None and load.queued_tokens:
            self.queued_tokens -= load.queued_tokens
            self.loads[request_id] = Assigned(0, load.blocks)

    def forget(self, request_id: str) -> None:
        """A request asks nothing any more; an unknown one is ignored."""
        load = self.loads.pop(request_id, None)
        if load is not None:
            self.queued_tokens -= load.queued_tokens
            self.used_blocks -= load.blocks


class Listener(Protocol):
    """Hears what steps have brought, and when one is planned."""

    def planned(self, lane: Lane, behind_s: float) -> None:
        """A step is planned and not launched; those before it end at `behind_s`."""

    def landed(self, lane: Lane, plan: StepPlan) -> None:
        """A step is over; what it brought follows."""

    def prompt_computed(self, lane: Lane, request_id: str) -> None:
        """A prompt's last position was computed and gave a token."""

    def ended(self, lane: Lane, event: Finished) -> None:
        """A request ended on this lane."""


class Flight(NamedTuple):
    """A step on the device: when it ends, and each lane's plan."""

    end_s: float
    plans: tuple[StepPlan, ...]


class Group:
    """Runs the lanes of one instance in lockstep.

    `run` is the live instance's loop: plan, start the pulls that are planned and launch, until `depth` steps
    are in flight, late where the engine does; then wait for the oldest to land. Pulls start behind the steps
    that are in flight already, which may write to their blocks, so that they mostly end soon after the
    oldest has landed: while another step is in flight, the next plan waits for them for up to `AWAIT_S`.
    """

    def __init__(self, index: int, spec: GroupSpec, listener: Listener) -> None:
        self.spec = spec
        names = [
            f"{spec.role}-{index}" + (f".{lane}" if spec.lanes > 1 else "") for lane in range(spec.lanes)
        ]
        self.lanes = tuple([Lane(name, spec.role, spec.make(spec.batching), self) for name in names])
        self.flights: deque[Flight] = deque()
        self.woken = False
        self.steps = 0
        self.busy_s = 0.0
        self._listener = listener
        self._device_free_s = 0.0
        self._tempo = None if spec.late_s is None else Tempo(spec.late_s)
        self._waits = False
        self._landed_s = -math.inf

    @property
    def idle(self) -> bool:
        """Whether no step is in flight: only then does a new request start one."""
        return not self.flights

    def run(self, now: float) -> float:
        """Land what is due and launch what can be; returns when to run again, inf when there is nothing."""
        if self._waits and self.flights[0].end_s <= now:
            self._land(self.flights.popleft().plans, now)
        while not self._waits and len(self.flights) < self.spec.depth:
            due_s = self._due(now)
            if due_s > now:
                return due_s
            plans = tuple([lane.scheduler.plan(now) for lane in self.lanes])
            for lane in self.lanes:
                self._listener.planned(lane, self.flights[-1].end_s if self.flights else now)
            if not any(plan.num_tokens for plan in plans):
                break
            self._launch(plans, now)
        if not self.flights:
            return math.inf
        if self._tempo is not None and not self._waits:
            self._tempo.waits(now)
        self._waits = True
        return max(now, self.flights[0].end_s)

    def _due(self, now: float) -> float:
        """When to plan the next step: late, and with the pulls that come in time."""
        ends = [end for lane in self.lanes for end in lane.pulls_end_s] if self.flights else []
        pulled_s = min(max(ends), self._landed_s + AWAIT_S) if ends else now
        return pulled_s if self._tempo is None else max(pulled_s, self._tempo.due())

    def _launch(self, plans: tuple[StepPlan, ...], now: float) -> None:
        loads = [load_of(plan) if plan.num_tokens else NO_LOAD for plan in plans]
        took = self.spec.step(loads)
        prompts = any(load.prefill_tokens for load in loads)
        host_s = self.spec.host_s + (self.spec.prompt_host_s if prompts else 0.0)
        start = max(now + host_s, self._device_free_s)
        before = self.flights[-1].end_s if self.flights else 0.0
        self._device_free_s = start + took / self.spec.stages
        self.steps += 1
        self.busy_s += took / self.spec.stages
        self.flights.append(Flight(max(start + took, before), plans))
        if self._tempo is not None:
            self._tempo.launched(plans[0], now, now + host_s)

    def _land(self, plans: Sequence[StepPlan], now: float) -> None:
        if self._tempo is not None:
            self._tempo.landed(now)
        self._waits = False
        self._landed_s = now
        for lane, plan in zip(self.lanes, plans, strict=True):
            ended = lane.scheduler.commit_counts(plan, now, self._counts(plan))
            self._listener.landed(lane, plan)
            for chunk in plan.prefills:
                if chunk.samples:
                    self._listener.prompt_computed(lane, chunk.request_id)
            for event in ended:
                self._listener.ended(lane, event)

    def _counts(self, plan: StepPlan) -> list[int] | None:
        acceptance = self.spec.acceptance
        if acceptance is None or plan.number < 0:
            return None
        single = len(plan.sampled_ids) - len(plan.decode_ids)
        return acceptance.counts(plan.decode_drafts) + [1] * single
