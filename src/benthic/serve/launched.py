"""What the engine remembers of a request, and of a step between its launch and its landing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from benthic.kernels.reference.sampling import NO_TOKEN
from benthic.serve.sample import Logprobs, Measured, logprobs_from
from benthic.serve.transit import Homeward

if TYPE_CHECKING:
    import torch

    from benthic.sched.batching import StepPlan
    from benthic.serve.drafts import Trial
    from benthic.serve.messages import Generate
    from benthic.serve.sampler import Drawing, Sampled

NOT_FINITE = "the model's next-token distribution is not finite"


@dataclass(eq=False)
class InFlight:
    """A request that has not ended, when it came, and what its first delta will carry."""

    request: Generate
    added_s: float
    announced: bool = False
    cached_tokens: int = 0
    queued_s: float = 0.0
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
class Row:
    """What one sequence drew in a step: its tokens and, where asked for, the log-probabilities of each.

    `failure` says why there is no token (or none behind these).
    """

    tokens: list[int]
    logprobs: list[Logprobs]
    failure: str | None = None


@dataclass(frozen=True)
class Launched:
    """A step whose work is queued on the device.

    `entries` are the requests behind `plan.sampled_ids` as they were at the launch: ids may end and be used
    again before the step lands. `trial` says which rows verify drafts. `error` says why it could not be
    launched. `written` is the end of its writes to the cache, where it must be waited for.
    """

    plan: StepPlan
    entries: tuple[InFlight, ...]
    drawing: Drawing | None = None
    prompts: list[PromptRows] = field(default_factory=list)
    trial: Trial | None = None
    error: Exception | None = None
    written: torch.cuda.Event | None = None

    @property
    def given(self) -> tuple[int, ...] | None:
        """How many drafts each decode had, where that was not what was planned."""
        counts = (0,) * len(self.plan.decode_ids) if self.trial is None else self.trial.drafts.counts
        return None if counts == self.plan.decode_drafts else counts

    def collect(self) -> list[Row]:
        """Wait for the step: a row for each of its requests, prompt log-probabilities go to theirs."""
        if self.written is not None:
            self.written.synchronize()
        for rows in self.prompts:
            rows.land()
        if self.drawing is None:
            return []
        sampled = self.drawing.collect()
        if self.trial is None or sampled.held is None:
            return [_row(sampled, i, 1) for i in range(len(sampled.tokens))]
        spans = zip(self.trial.first, sampled.held, strict=True)
        return [_row(sampled, first, held + 1) for first, held in spans]


def _row(sampled: Sampled, first: int, count: int) -> Row:
    """Rows of logits from `first` on as one row of tokens, up to the first that drew none."""
    tokens = sampled.tokens[first : first + count]
    logprobs = [sampled.logprobs[i] for i in range(first, first + count) if i in sampled.logprobs]
    if NO_TOKEN in tokens:
        lost = tokens.index(NO_TOKEN)
        failure = sampled.failures.get(first + lost, NOT_FINITE)
        return Row(tokens[:lost], logprobs[:lost], failure)
    return Row(tokens, logprobs)
