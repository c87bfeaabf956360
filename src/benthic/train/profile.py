"""Traces of a few steps by torch's profiler, one a rank, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Steps:
    """The steps from `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, words: str, steps: int) -> Steps:
        """`3:5` are three steps, `4` is one, of a run of `steps`.

        Raises:
            ConfigError: `words` are no steps, or the run ends before the first of them.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", words.strip())
        if found is not None:
            first = int(found[1])
            last = first if found[2] is None else int(found[2])
            if 1 <= first <= last and first <= steps:
                return cls(first, last)
            if steps < first <= last:
                message = f"--profile {words} begins at step {first}, but train.steps={steps}. Name others."
                raise ConfigError(message)
        message = f"--profile {words} names no steps. Write FIRST:LAST from 1 on, e.g. 3:5, or one step."
        raise ConfigError(message)


@dataclass
class Tracer:
    """Profiles `steps` of this rank and writes the trace to `path`; None profiles nothing."""

    steps: Steps | None
    path: Path
    _profiler: profile | None = field(default=None)

    def before(self, step: int) -> None:
        """Start with the first of the steps; a run that resumes among them starts there."""
        wanted = self.steps is not None and self.steps.first <= step <= self.steps.last
        if wanted and self._profiler is None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after(self, step: int, *, last: bool) -> Path | None:
        """Stop after the last of the steps, or with the run; where the trace is, if it was written now."""
        if self._profiler is None or self.steps is None or not (last or step >= self.steps.last):
            return None
        self._profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        self._profiler = None
        return self.path
