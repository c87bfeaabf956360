"""What a step holds, as far as its time depends on it, and who says how long that takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from benthic.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.sched.plans import StepPlan


class StepLoad(NamedTuple):
    """One rank's part of a step.

    Attributes:
        decodes: sequences that decode.
        decode_tokens: tokens they compute, drafts included.
        decode_context: positions that they attend to, summed over the sequences.
        prefill_tokens: tokens of prompts.
        prefill_pairs: pairs of a prompt token and a position that it sees, causal.
        prefill_context: positions that the prompts' chunks see, summed over the chunks.
        samples: rows from which tokens are drawn.
    """

    decodes: int
    decode_tokens: int
    decode_context: int
    prefill_tokens: int
    prefill_pairs: int
    prefill_context: int
    samples: int

    @property
    def tokens(self) -> int:
        """Rows of the forward pass."""
        return self.decode_tokens + self.prefill_tokens


def load_of(plan: StepPlan) -> StepLoad:
    """Sum a plan up. Chunks of one token count as decodes, as the engine computes them.

    Cost: O(rows), a few nanoseconds each.
    """
    decodes = len(plan.decode_ids)
    context = sum(plan.decode_positions) + decodes
    tokens = pairs = seen = 0
    samples, singles = decodes, 0
    for chunk in plan.prefills:
        length = chunk.length
        end = chunk.start + length
        samples += chunk.samples
        if length == 1:
            singles += 1
            context += end
            continue
        tokens += length
        pairs += length * chunk.start + length * (length + 1) // 2
        seen += end
    rows = plan.num_tokens - tokens
    return StepLoad(decodes + singles, rows, context, tokens, pairs, seen, samples)


class StepTime(Protocol):
    """Seconds that the device needs for a step, given what each rank of its group does in it.

    Ranks step together: the slowest one and what they exchange set the time.
    """

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds, above 0."""


@dataclass(kw_only=True)
class Measured:
    """Step times of a recorded run, in the order of its steps."""

    seconds: Sequence[float]
    taken: int = field(default=0)

    def __call__(self, loads: Sequence[StepLoad]) -> float:  # noqa: ARG002 (a StepTime)
        """The next one. Raises: DataError when the run had no more steps."""
        if self.taken == len(self.seconds):
            msg = f"the recording holds {self.taken} steps, but the simulation asks for one more"
            raise DataError(msg)
        self.taken += 1
        return self.seconds[self.taken - 1]
