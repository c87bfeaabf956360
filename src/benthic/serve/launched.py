"""What the engine remembers of a request, and of a step between its launch and its landing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from benthic.serve.sample import Logprobs, Measured, logprobs_from
from benthic.serve.sampler import Sampled
from benthic.serve.transit import Homeward

if TYPE_CHECKING:
    from benthic.sched.batching import StepPlan
    from benthic.serve.messages import Generate
    from benthic.serve.sampler import Drawing


@dataclass(eq=False)
class InFlight:
    """A request that has not ended, and what its first delta will carry."""

    request: Generate
    announced: bool = False
    cached_tokens: int = 0
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class PromptRows:
    """Log-probabilities of some of a request's prompt tokens, from position `first` on, on their way home."""

    entry: InFlight
    first: int
    homeward: Homeward

    @classmethod
    def start(cls, entry: InFlight, first: int, measured: Measured) -> Self:
        """Queue their copies."""
        return cls(entry, first, Homeward.start(*measured))

    def land(self) -> None:
        """Hand them to the request."""
        measured = Measured(*self.homeward.wait())
        rows = len(measured.token_L)
        best = self.entry.request.params.prompt_logprobs or 0
        self.entry.prompt_logprobs[self.first : self.first + rows] = logprobs_from(measured, [best] * rows)


@dataclass(frozen=True)
class Launched:
    """A step whose work is queued on the device.

    `entries` are the requests behind `plan.sampled_ids` as they were at the launch: ids may end and be used
    again before the step lands. `error` says why it could not be launched.
    """

    plan: StepPlan
    entries: tuple[InFlight, ...]
    drawing: Drawing | None = None
    prompts: list[PromptRows] = field(default_factory=list)
    error: Exception | None = None

    def collect(self) -> Sampled:
        """Wait for the step: its tokens, and prompt log-probabilities handed to their requests."""
        for rows in self.prompts:
            rows.land()
        return Sampled([]) if self.drawing is None else self.drawing.collect()
