"""Random workloads on a device whose tokens betray every wrong table, prefix or position."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from fake_device import EOS, FakeDevice, alone, check_empty, check_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benthic.sched.batching import BatchingConfig, Finished, Request, StepPlan
from benthic.sched.replay import RecordingScheduler, replay


@dataclass
class Workload:
    config: BatchingConfig
    requests: list[Request]
    arrivals: list[int]
    aborts: dict[int, list[int]]
    failing: set[int]
    depth: int
    seed: int


@dataclass
class Outcome:
    ends: dict[str, Finished] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    steps: int = 0


@st.composite
def workloads(draw: st.DrawFn, *, trouble: bool = True) -> Workload:
    block_size = draw(st.sampled_from([1, 2, 3, 8]))
    max_model_len = draw(st.integers(2, 40))
    max_num_seqs = draw(st.integers(1, 6))
    config = BatchingConfig(
        num_blocks=-(-max_model_len // block_size) + draw(st.integers(0, 8)),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 20)),
        num_speculative_tokens=draw(st.sampled_from([0, 0, 1, 3])),
        adaptive_drafts=draw(st.booleans()),
        mtp_depth=draw(st.integers(0, 2)),
        enable_prefix_caching=draw(st.booleans()),
        eos_token_ids=(EOS,),
        priority_seconds=draw(st.sampled_from([0.0, 5.0, 60.0])),
        watermark=draw(st.sampled_from([0.0, 0.01, 0.3])),
        host_blocks=draw(st.sampled_from([0, 0, 1, 2, 5, 40])),
    )
    count = draw(st.integers(1, 12))
    trunk = tuple(draw(st.lists(st.integers(1, 3), min_size=max_model_len, max_size=max_model_len)))
    requests = [_request(draw, str(i), trunk, max_model_len) for i in range(count)]
    moments = st.integers(0, 30)
    aborted = draw(st.lists(st.tuples(moments, st.integers(0, count - 1)), max_size=3)) if trouble else []
    aborts: dict[int, list[int]] = {}
    for moment, victim in aborted:
        aborts.setdefault(moment, []).append(victim)
    return Workload(
        config=config,
        requests=requests,
        arrivals=draw(st.lists(moments, min_size=count, max_size=count)),
        aborts=aborts,
        failing=draw(st.sets(moments, max_size=1)) if trouble else set(),
        depth=draw(st.sampled_from([1, 1, 2, 3, 5])),
        seed=draw(st.integers(0, 1 << 30)),
    )


def _request(draw: st.DrawFn, name: str, trunk: tuple[int, ...], max_model_len: int) -> Request:
    shared = draw(st.integers(0, max_model_len - 1))
    own = tuple(draw(st.lists(st.integers(1, 3), max_size=max_model_len - 1 - shared)))
    prompt = (trunk[:shared] + own) or (1,)
    max_tokens = draw(st.integers(0, 12))
    return Request(
        request_id=name,
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(st.sampled_from([(), (7, 8, 9, 10, 11)])),
        ignore_eos=draw(st.booleans()),
        priority=draw(st.integers(-1, 1)),
        salt=draw(st.sampled_from(["", "", "other"])),
        reuse_prefix=draw(st.sampled_from([True, True, True, False])),
        speculate=draw(st.sampled_from([True, True, False])),
    )


def execute(work: Workload) -> Outcome:
    """Serve a workload with up to `depth` plans in flight, checking every plan; every request ends once."""
    outcome = Outcome()
    scheduler = RecordingScheduler(work.config, outcome.lines.append)
    device = FakeDevice(work.config, random.Random(work.seed))  # noqa: S311 (not a secret)
    rng = random.Random(work.seed + 1)  # noqa: S311 (not a secret)
    flights: deque[tuple[StepPlan, list[tuple[int, ...]]]] = deque()
    moment = 0
    while scheduler.has_work or moment <= max(work.arrivals):
        for request, arrival in zip(work.requests, work.arrivals, strict=True):
            if arrival == moment:
                scheduler.add(request, float(moment))
                outcome.outputs[request.request_id] = []
        plan = scheduler.plan(float(moment))
        check_plan(scheduler, plan)
        outcome.plans.append(plan)
        if plan.num_tokens:
            flights.append((plan, device.run(plan)))
        else:
            assert not plan.to_host
            assert not plan.from_host
            assert flights or not scheduler.has_work, "idle, yet requests wait and nothing is in flight"
        for victim in work.aborts.get(moment, []):
            ended = scheduler.abort(str(victim), float(moment))
            if ended is not None:
                assert outcome.ends.setdefault(ended.request_id, ended) is ended
        while flights and (len(flights) >= work.depth or not plan.num_tokens or rng.random() < 0.2):
            _come_back(scheduler, *flights.popleft(), moment, outcome, failed=moment in work.failing)
        moment += 1
        assert moment < 5000, "requests do not end"
    outcome.steps = moment
    check_empty(scheduler)
    return outcome


def _come_back(
    scheduler: RecordingScheduler,
    plan: StepPlan,
    rows: list[tuple[int, ...]],
    moment: int,
    outcome: Outcome,
    *,
    failed: bool,
) -> None:
    if failed:
        ended = scheduler.fail(plan, float(moment))
        rows = [()] * len(rows)
    else:
        ended = scheduler.commit(plan, rows, float(moment))
    kept = {event.request_id: event.kept for event in ended}
    for name, row in zip(plan.sampled_ids, rows, strict=True):
        if name not in outcome.ends:
            outcome.outputs[name] += row[: kept.get(name, len(row))]
    for event in ended:
        assert outcome.ends.setdefault(event.request_id, event) is event, "a request ended twice"
        assert event.num_generated == len(outcome.outputs[event.request_id])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(workloads())
def test_every_request_ends_with_the_tokens_it_would_have_alone(work: Workload) -> None:
    outcome = execute(work)
    assert set(outcome.ends) == {request.request_id for request in work.requests}
    for request in work.requests:
        end, output = outcome.ends[request.request_id], tuple(outcome.outputs[request.request_id])
        expected, reason = alone(request, work.config)
        if end.reason in ("abort", "error"):
            assert output == expected[: len(output)]
        else:
            assert (output, end.reason) == (expected, reason)
        assert end.stop_token == (output[-1] if end.reason == "stop" else None)
        assert end.cached_tokens < max(2, len(request.prompt or ()))
        assert end.cached_tokens == 0 or (request.reuse_prefix and work.config.enable_prefix_caching)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(workloads())
def test_a_recorded_run_replays_to_identical_plans(work: Workload) -> None:
    outcome = execute(work)
    replayed = replay(outcome.lines)
    assert replayed.plans == len(outcome.plans)
    assert replayed.requests == len(work.requests)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(workloads(trouble=False))
def test_a_request_without_preemption_runs_in_every_step_from_its_first_decode_on(work: Workload) -> None:
    outcome = execute(work)
    if work.config.num_speculative_tokens and work.depth > 1:
        return  # drafts in flight make a sequence sit out
    seen: dict[str, list[int]] = {}
    for index, plan in enumerate(outcome.plans):
        for name in plan.decode_ids:
            seen.setdefault(name, []).append(index)
    for name, indices in seen.items():
        if outcome.ends[name].preemptions == 0:
            gaps = [plan for plan in outcome.plans[indices[0] : indices[-1]] if not plan.num_tokens]
            assert indices[-1] - indices[0] + 1 == len(indices) + len(gaps)
