"""Schedules by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benthic.errors import UnknownFieldError
from benthic.sched.pipeline.gpipe import gpipe
from benthic.sched.pipeline.one_f_one_b import one_f_one_b

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.pipeline.table import Table

BUILDERS: Final[dict[str, Callable[[int, int], Table]]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def build(name: str, ranks: int, microbatches: int) -> Table:
    """The schedule called `name`.

    Raises:
        UnknownFieldError: no such schedule.
        ConfigError: the schedule does not exist for these numbers.
    """
    if name not in BUILDERS:
        raise UnknownFieldError(kind="schedule", name=name, known=BUILDERS)
    return BUILDERS[name](ranks, microbatches)
