"""What is measured of some steps beside their losses: timeline, slow ranks, profiler traces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from benthic.parallel.recorder import Pace, Recorder, everyones
from benthic.train.profile import Tracer
from benthic.train.stragglers import Slowest, Stragglers

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.sched.pipeline.spans import Span
    from benthic.sched.pipeline.table import Table
    from benthic.train.trainer import StepResult, Trainer

RECORDED_BETWEEN: Final = 100
"""Of so many console lines one comes with a comparison of ranks, where steps are CUDA graphs."""


@dataclass(frozen=True)
class Measured:
    """A step with what was measured of it; rank 0 has the spans of all pipeline ranks."""

    result: StepResult
    spans: list[Span]
    slowest: Slowest | None
    notes: list[str]


@dataclass
class Measures:
    """Runs the steps of a trainer and measures those that are due; the others cost nothing.

    Attributes:
        recorded: the pipeline table whose slots were measured last, by this process.
    """

    trainer: Trainer
    tracer: Tracer
    recorder: Recorder
    stragglers: Stragglers = field(default_factory=Stragglers)
    recorded: Table | None = field(default=None)

    @classmethod
    def of(cls, trainer: Trainer, folder: Path) -> Measures:
        """Those of a run in `folder`."""
        tracer = Tracer(None, folder / "profile" / f"rank-{trainer.mesh.rank}.json")
        return cls(trainer, tracer, Recorder(trainer.mesh, trainer.device))

    def step(self) -> Measured:
        """Run the next step."""
        trainer, log = self.trainer, self.trainer.config.log
        step = trainer.steps_done + 1
        timed = log.timeline_every > 0 and step % log.timeline_every == 0
        pace = self._pace(step, log.every)
        if timed:
            self.recorder.start(trainer.executor.pipeline)
        self.tracer.before(step)
        trainer.executor.measure(pace)
        result = trainer.step()
        trace = self.tracer.after(step, last=step == trainer.config.train.steps)
        slowest, notes = self._compare(pace)
        spans: list[Span] = []
        if timed:
            spans = self.recorder.stop(trainer.executor.pipeline, step)
            self.recorded = trainer.table
        notes += [f"profile: {trace}"] if trace is not None else []
        return Measured(result, spans, slowest, notes)

    def _pace(self, step: int, every: int) -> Pace | None:
        """Ranks are compared when there are several; the first step, which compiles, says nothing."""
        if self.trainer.recorded:  # such a step is launched kernel by kernel, to be measured
            every *= RECORDED_BETWEEN
        due = every > 0 and step % every == 0 and step > 1
        return Pace.started(self.trainer.device) if due and self.trainer.mesh.world.size > 1 else None

    def _compare(self, pace: Pace | None) -> tuple[Slowest | None, list[str]]:
        self.trainer.executor.measure(None)
        if pace is None:
            return None, []
        return self.stragglers.add(everyones(pace.seconds(), self.trainer.mesh.world, self.trainer.device))
