"""What stands for a CUDA graph on a CPU: what was recorded is run again by calling it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.train.recording import Found


class Again:
    """What is recorded, run again by calling it."""

    def __init__(self, compute: Callable[[], Found]) -> None:
        self.runs, self.compute, self.found = 0, compute, compute()

    def replay(self) -> None:
        new, old = self.compute(), self.found
        pairs = [(old.norm, new.norm), (old.outcome.main, new.outcome.main)]
        pairs += list(zip(old.outcome.mtp, new.outcome.mtp, strict=True))
        pairs += [(old.outcome.balance, new.outcome.balance), (old.outcome.over, new.outcome.over)]
        pairs += [(old.outcome.counts[layer], count) for layer, count in new.outcome.counts.items()]
        for here, there in pairs:
            here.copy_(there)
        self.runs += 1

    def reset(self) -> None:
        self.compute = nothing


def nothing() -> Found:
    raise AssertionError
