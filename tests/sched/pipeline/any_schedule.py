"""Sizes that each builder takes, for hypothesis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from benthic.sched.pipeline.schedules import BUILDERS, build

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.sched.pipeline.table import Table


@st.composite
def tables(draw: st.DrawFn, names: Sequence[str] = tuple(BUILDERS), *, at_least: int = 1) -> Table:
    """Any table of one of the schedules `names`, of up to eight ranks, at least `at_least`."""
    name = draw(st.sampled_from(names))
    virtual_stages = None
    if name in {"chimera", "dualpipe"}:
        ranks = 2 * draw(st.integers((at_least + 1) // 2 or 1, 4))
    else:
        ranks = draw(st.integers(at_least, 7))
    if name == "interleaved":
        virtual_stages = draw(st.integers(2, 4))
    if name in {"interleaved", "chimera"}:
        microbatches = ranks * draw(st.integers(1, 3))
    elif name == "dualpipe":
        microbatches = 2 * (ranks + draw(st.integers(0, 5)))
    elif name == "dualpipev":
        microbatches = 2 * ranks + draw(st.integers(0, 7))
    else:
        microbatches = draw(st.integers(1, 16))
    return build(name, ranks, microbatches, virtual_stages=virtual_stages)
