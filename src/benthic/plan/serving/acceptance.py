"""How many tokens a step of speculative decoding yields: a model of what verification will accept."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Acceptance(Protocol):
    """Says how the drafts of a step fared."""

    def counts(self, drafts: Sequence[int]) -> list[int]:
        """Tokens that each row yields: 1 to `1 + drafts[i]`."""


@dataclass(kw_only=True)
class Geometric:
    """Every draft is accepted with probability `alpha` if those before it were; drawn from `seed`.

    Raises:
        ConfigError: `alpha` is no probability.
    """

    alpha: float
    seed: int = 0
    _generator: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        self._generator = random.Random(self.seed)  # noqa: S311 (a model, not a secret)

    def counts(self, drafts: Sequence[int]) -> list[int]:
        """Draw one count a row."""
        return [self._count(each) for each in drafts]

    def _count(self, drafts: int) -> int:
        count = 1
        while count <= drafts and self._generator.random() < self.alpha:
            count += 1
        return count


def expected_tokens(alpha: float, drafts: int) -> float:
    """Tokens a step of `drafts` drafts yields on average: `(1 - alpha^(k+1)) / (1 - alpha)` (Leviathan 2023).

    Raises:
        ConfigError: `alpha` is no probability.
    """
    check_alpha(alpha)
    if alpha == 1.0:
        return float(drafts + 1)
    return (1.0 - alpha ** (drafts + 1)) / (1.0 - alpha)


def check_alpha(alpha: float) -> None:
    """Raises: ConfigError if `alpha` is no probability."""
    if not 0.0 <= alpha <= 1.0:
        msg = f"the acceptance rate is {alpha}, but it is a probability in [0, 1]"
        raise ConfigError(msg)
