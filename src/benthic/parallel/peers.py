"""All ranks of a run doing something together that any of them may fail at: saving, loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from benthic.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

Found = TypeVar("Found")


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, in a form that other ranks can raise."""

    kind: type[CheckpointError]
    text: str


@dataclass(frozen=True)
class Peers:
    """The ranks of a run on a gloo group of their own, which a thread may use beside the training step.

    The default is a process alone.
    """

    index: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    @classmethod
    def everyone(cls, *, timeout: timedelta | None = None) -> Peers:
        """Every rank of the default group, this process alone without one; every rank must call it."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        handle = dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), handle)

    def each(self, function: Callable[[], Found]) -> list[Found]:
        """Call `function` on every rank and return everyone's result, in the order of ranks.

        Raises:
            CheckpointError: it failed somewhere; every rank raises and names the first one that failed.
        """
        outcome: Found | Failure
        cause: Exception | None = None
        try:
            outcome = function()
        except Exception as error:  # noqa: BLE001 (raised below, here and on every other rank)
            outcome, cause = _failure(error), error
        return self._agree(self._exchange(outcome), cause)

    def first(self, function: Callable[[], Found]) -> Found:
        """Call `function` on rank 0 and return its result on every rank.

        Raises:
            CheckpointError: it failed; every rank raises.
        """
        results = self.each(lambda: function() if self.index == 0 else None)
        return results[0]  # type: ignore[return-value]

    def _exchange(self, outcome: Found | Failure) -> list[Found | Failure]:
        if self.size == 1:
            return [outcome]
        outcomes: list[Found | Failure | None] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, outcome, group=self.handle)
        except RuntimeError as error:
            raise self.lost(error) from error
        return outcomes  # type: ignore[return-value]

    def lost(self, error: RuntimeError) -> CheckpointError:
        """What to raise when the group itself broke."""
        return CheckpointError(
            f"rank {self.index} of {self.size} lost contact with the others at a checkpoint ({error}). "
            "See which rank ended, then start all again with --resume."
        )

    def _agree(self, outcomes: list[Found | Failure], cause: Exception | None) -> list[Found]:
        failures = {rank: o for rank, o in enumerate(outcomes) if isinstance(o, Failure)}
        if failures:
            rank, failure = next(iter(failures.items()))
            message = f"{where(rank, self.size, len(failures))}{failure.text}"
            raise failure.kind(message) from cause
        return outcomes  # type: ignore[return-value]


def where(rank: int, ranks: int, failed: int) -> str:
    """The rank to blame as the beginning of a message; nothing when there is only one."""
    if ranks == 1:
        return ""
    return f"rank {rank} of {ranks}: " if failed == 1 else f"rank {rank} and {failed - 1} more of {ranks}: "


def _failure(error: Exception) -> Failure:
    if isinstance(error, CheckpointError):
        return Failure(type(error), str(error))
    return Failure(
        CheckpointError, str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    )
