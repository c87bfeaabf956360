"""A training plan in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as Grid

from benthic import units
from benthic.plan.cost.priced import coverage_bar
from benthic.plan.training.memory import TERMS, usable
from benthic.plan.training.step import waterfall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.training.plan import Plan
    from benthic.plan.training.search import Evaluated
    from benthic.plan.training.space import Choice

_BAR = 28


def lines(plan: Plan) -> Iterator[str | Grid]:
    """What is printed, in order."""
    yield from _answer(plan)
    yield _layouts("fastest that fit", plan.found.best)
    yield _waterfall(plan.best)
    yield f"seconds by where they come from: {coverage_bar(plan.best.step.price.coverage)}"
    yield _memory(plan)
    if len(plan.front) > 1:
        yield _layouts("less memory for more time", plan.front)
    yield from _others(plan)


def _answer(plan: Plan) -> Iterator[str]:
    question, best, run = plan.question, plan.best, plan.run
    price = best.step.price
    yield f"{question.model.name} on {question.gpus:,} {question.machine.name}: {best.candidate.words()}"
    yield (
        f"a step of {best.candidate.step_tokens:,} tokens takes {units.seconds(price.seconds)} "
        f"({units.seconds(price.low)} to {units.seconds(price.high)}); "
        f"{best.step.tokens_per_second / question.gpus:,.0f} tokens/s a GPU, "
        f"{units.percent(plan.mfu)} of the BF16 peak (causal)"
    )
    yield (
        f"{units.count(question.tokens)} tokens: {units.seconds(run.seconds)}, "
        f"{run.gpu_hours:,.0f} GPU hours, "
        f"${run.usd:,.0f} at ${plan.usd_per_gpu_hour:g} an hour, "
        f"goodput {units.percent(run.goodput)} under failures"
    )


def _layouts(title: str, found: list[Evaluated]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    grid.add_column("layout")
    for name in ("step", "memory", "bubble"):
        grid.add_column(name, justify="right")
    for one in found:
        grid.add_row(
            one.candidate.words(),
            units.seconds(one.step.seconds, 4),
            units.size(one.memory.total, 3),
            units.percent(one.step.timeline.bubble_fraction),
        )
    return grid


def _waterfall(best: Evaluated) -> Grid:
    """The busiest rank's step, the longest part first."""
    title = f"where the step goes, pipeline rank {best.step.busiest}"
    grid = Grid(box=None, pad_edge=False, title=title, title_justify="left", show_header=False)
    parts = sorted(waterfall(best.step).items(), key=lambda part: -part[1])
    longest = parts[0][1]
    for name, seconds in parts:
        bar = "█" * round(_BAR * seconds / longest)
        grid.add_row(name, units.seconds(seconds), units.percent(seconds / best.step.seconds), bar)
    return grid


def _memory(plan: Plan) -> str:
    terms = ", ".join(
        f"{name} {units.size(plan.best.memory.terms[name], 3)}"
        for name in TERMS
        if plan.best.memory.terms.get(name)
    )
    room = usable(plan.question.machine.hardware)
    total = units.size(plan.best.memory.total, 3)
    return f"memory of pipeline rank {plan.best.memory.rank}: {total} of {units.size(room, 3)} = {terms}"


def _others(plan: Plan) -> Iterator[str]:
    found = plan.found
    if plan.runner_up is not None:
        yield f"runner-up: {plan.runner_up}"
    refused = found.fastest_refused
    if refused is not None:
        yield (
            f"{found.too_large:,} of {found.screened:,} layouts do not fit; the fastest of them, at least "
            f"{units.seconds(refused.seconds)} a step, needs {units.size(refused.bytes, 3)}: "
            f"{_choice(refused.choice)}"
        )
    yield (
        f"screened {found.screened:,} layouts, bounded {found.looked_at:,} closely, simulated "
        f"{len(found.evaluated):,}, in {units.seconds(plan.seconds)}"
    )


def _choice(choice: Choice) -> str:
    return (
        f"PP{choice.pp} {choice.schedule} x EP{choice.ep} x TP{choice.tp}, ZeRO-{choice.zero}, "
        f"{choice.precision}, recompute {choice.recompute}"
    )
