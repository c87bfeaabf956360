"""Requests and steps that follow a formula, for simulations without a model or a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from benthic.plan.serving.steps import StepLoad


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Log-normal lengths of given means, independent, cut to `most` tokens of prompt and answer together.

    `spread` is the standard deviation of the logarithm: 0 gives the means, 1 a mix as of chats.
    """

    prompt_tokens: int
    output_tokens: int
    spread: float = 1.0
    most: int = 1 << 20

    @property
    def mean(self) -> tuple[float, float]:
        """Before the cut."""
        return float(self.prompt_tokens), float(self.output_tokens)

    def draw(self, generator: random.Random, count: int) -> list[tuple[int, int]]:
        """Independent pairs."""
        return [self._pair(generator) for _ in range(count)]

    def _pair(self, generator: random.Random) -> tuple[int, int]:
        shift = -(self.spread**2) / 2.0
        prompt, output = (
            max(1, round(mean * generator.lognormvariate(shift, self.spread)))
            for mean in (self.prompt_tokens, self.output_tokens)
        )
        prompt = min(prompt, self.most - 1)
        return prompt, min(output, self.most - prompt)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A step time linear in what the busiest rank does (seconds, and seconds a token or position)."""

    fixed: float
    token: float = 0.0
    sequence: float = 0.0
    context: float = 0.0
    pair: float = 0.0

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds."""
        return self.fixed + max([self._work(load) for load in loads])

    def _work(self, load: StepLoad) -> float:
        return (
            self.token * load.tokens
            + self.sequence * load.decodes
            + self.context * load.decode_context
            + self.pair * load.prefill_pairs
        )
