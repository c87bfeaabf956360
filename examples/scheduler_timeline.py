"""Four requests through the scheduler, step by step: `python examples/scheduler_timeline.py`.

No model is needed: every token is a 7 and every step takes one second. The cache has 14 blocks of 4 tokens
and a step computes at most 16 tokens, so much happens within a few lines: a long prompt in chunks beside a
short one, two equal prompts of which one is computed, a preemption, and a resumption from the cache.
"""

from __future__ import annotations

from benthic.sched.batching import (
    BatchingConfig,
    Finished,
    Preempted,
    Request,
    Scheduler,
    Started,
    StepPlan,
)

CONFIG = BatchingConfig(
    num_blocks=14, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, watermark=0.0
)
ARRIVALS = {
    0: [
        Request(request_id="long", prompt=tuple(range(100, 130)), max_tokens=6),
        Request(request_id="short", prompt=tuple(range(200, 205)), max_tokens=9),
    ],
    3: [
        Request(request_id="twin-1", prompt=tuple(range(300, 309)), max_tokens=9),
        Request(request_id="twin-2", prompt=tuple(range(300, 309)), max_tokens=9),
    ],
}


def timeline() -> list[str]:
    """One line a step: time, tokens, decodes (at position), prefills (positions), free blocks, events."""
    scheduler = Scheduler(CONFIG)
    lines = [f"{'t':>2} {'tokens':>6} {'free':>4}  {'decodes':<34} {'prefills':<30} events"]
    now = 0
    while scheduler.has_work or now <= max(ARRIVALS):
        for request in ARRIVALS.get(now, ()):
            scheduler.add(request, float(now))
        plan = scheduler.plan(float(now))
        ended = scheduler.commit(plan, [(7,)] * len(plan.sampled_ids), float(now + 1))
        lines.append(_line(now, plan, ended, scheduler.num_free_blocks))
        now += 1
    return lines


def _line(now: int, plan: StepPlan, ended: tuple[Finished, ...], num_free: int) -> str:
    decodes = [
        f"{name}@{position}" for name, position in zip(plan.decode_ids, plan.decode_positions, strict=True)
    ]
    prefills = [f"{chunk.request_id}[{chunk.start}:{chunk.start + chunk.length}]" for chunk in plan.prefills]
    events = [*map(_event, plan.events), *map(_event, ended)]
    return (
        f"{now:>2} {plan.num_tokens:>6} {num_free:>4}  {' '.join(decodes):<34} {' '.join(prefills):<30} "
        f"{', '.join(events)}"
    ).rstrip()


def _event(event: Started | Preempted | Finished) -> str:
    if isinstance(event, Started):
        cached = f", {event.cached_tokens} cached" if event.cached_tokens else ""
        return f"{event.request_id} {'resumes' if event.resumed else 'starts'}{cached}"
    if isinstance(event, Preempted):
        return f"{event.request_id} is preempted"
    return f"{event.request_id} ends ({event.reason}, {event.num_generated} tokens)"


if __name__ == "__main__":
    print("\n".join(timeline()))
