"""Schedules by name, and what sizes each takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError, UnknownFieldError
from benthic.sched.pipeline.chimera import chimera
from benthic.sched.pipeline.dualpipe import dualpipe
from benthic.sched.pipeline.dualpipe_v import dualpipe_v
from benthic.sched.pipeline.gpipe import gpipe
from benthic.sched.pipeline.interleaved import interleaved
from benthic.sched.pipeline.one_f_one_b import one_f_one_b
from benthic.sched.pipeline.zb_h1 import zb_h1
from benthic.sched.pipeline.zb_v import zb_v

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.pipeline.table import Table


@dataclass(frozen=True)
class Builder:
    """How a schedule is built.

    Args:
        make: the builder; takes ranks, microbatches and, if `virtual_stages` is None, the virtual stages.
        sizes: what it needs, in words.
        virtual_stages: stages of the model for each rank; None if the caller chooses.
        pairs: some slots overlap a forward and a backward.
    """

    make: Callable[..., Table]
    sizes: str = "any ranks and microbatches"
    virtual_stages: int | None = 1
    pairs: bool = False


BUILDERS: Final[dict[str, Builder]] = {
    "gpipe": Builder(gpipe),
    "1f1b": Builder(one_f_one_b),
    "interleaved": Builder(interleaved, "microbatches a multiple of ranks", virtual_stages=None),
    "zb-h1": Builder(zb_h1),
    "zb-v": Builder(zb_v, virtual_stages=2),
    "chimera": Builder(chimera, "even ranks, microbatches a multiple of ranks"),
    "dualpipe": Builder(dualpipe, "even ranks, even microbatches, at least two a rank", pairs=True),
    "dualpipev": Builder(dualpipe_v, "at least two microbatches a rank", virtual_stages=2, pairs=True),
}


def unit(name: str, ranks: int) -> int:
    """The number of which the microbatches of a schedule must be a multiple."""
    return {"interleaved": ranks, "chimera": ranks, "dualpipe": 2}.get(name, 1)


def build(name: str, ranks: int, microbatches: int, *, virtual_stages: int | None = None) -> Table:
    """The schedule called `name`.

    Args:
        name: a key of `BUILDERS`.
        ranks: pipeline ranks.
        microbatches: microbatches a step.
        virtual_stages: stages of the model for each rank; None: the schedule's own number, 2 if it takes any.

    Raises:
        UnknownFieldError: no such schedule.
        ConfigError: the schedule does not exist for these numbers.
    """
    if name not in BUILDERS:
        raise UnknownFieldError(kind="schedule", name=name, known=BUILDERS)
    builder = BUILDERS[name]
    if builder.virtual_stages is None:
        return builder.make(ranks, microbatches, 2 if virtual_stages is None else virtual_stages)
    if virtual_stages not in {None, builder.virtual_stages}:
        takes = f"schedule {name!r} cuts the model into {builder.virtual_stages} a rank"
        message = f"virtual_stages = {virtual_stages}, but {takes}. Leave it out, or choose 'interleaved'."
        raise ConfigError(message)
    return builder.make(ranks, microbatches)
