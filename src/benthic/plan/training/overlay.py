"""The step that a plan foretells as a trace for ui.perfetto.dev, alone or beside a run of the same table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benthic.sched.pipeline.export import perfetto
from benthic.sched.pipeline.spans import measured, read_spans

if TYPE_CHECKING:
    from benthic.plan.training.step import Step
    from benthic.sched.pipeline.simulate import Timeline


def overlay(step: Step, spans: str = "") -> str:
    """Chrome's JSON; "predicted" and, with the lines of a spans file, "measured" begin at the same time 0.

    Raises:
        DataError: a line of `spans` is none.
        ScheduleError: they are of another table; the first slot that differs is named.
    """
    timelines = [_called(step.timeline, "predicted")]
    if spans.strip():
        run = measured(step.timeline.table, read_spans(spans))
        timelines.append(_called(run, "measured"))
    return perfetto(*timelines, microseconds=1e6)


def _called(timeline: Timeline, word: str) -> Timeline:
    return replace(timeline, table=replace(timeline.table, name=f"{timeline.table.name}, {word}"))
