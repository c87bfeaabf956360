from __future__ import annotations

import dataclasses
import math

import pytest

from benthic.spec import presets
from benthic.spec.layout import Layout, box
from benthic.spec.parameters import parameters

NANO = presets.get("nano")


def problems(layout: Layout, model=NANO, *, seq_len: int = 32) -> list[str]:
    return list(layout.problems(model, ranks=layout.ranks, seq_len=seq_len))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp_degree=4), Layout(cp_degree=4), Layout(tp_degree=4, cp_degree=2, dp_degree=2)],
)
def test_layouts_that_divide_have_no_problems(layout: Layout) -> None:
    assert not problems(layout)


def test_widths_that_do_not_divide_over_tensor_ranks_are_named_with_their_divisor() -> None:
    assert problems(Layout(tp_degree=8)) == [
        "num_attention_heads = 4 does not divide over layout.tp_degree=8. Set tp_degree to a divisor of 4."
    ]
    wide = dataclasses.replace(NANO, num_attention_heads=3)
    dense, shared = problems(Layout(tp_degree=3), wide, seq_len=33)
    assert dense == (
        "intermediate_size = 64 does not divide over layout.tp_degree=3. Set tp_degree to a divisor of 64."
    )
    assert shared == (
        "n_shared_experts x moe_intermediate_size = 16 does not divide over layout.tp_degree=3. "
        "Set tp_degree to a divisor of 16."
    )


def test_a_width_that_no_layer_has_need_not_divide() -> None:
    sparse = dataclasses.replace(NANO, first_k_dense_replace=0, n_shared_experts=0, intermediate_size=7)
    assert not problems(Layout(tp_degree=4), sparse)


def test_rows_must_divide_into_an_early_and_a_late_chunk_for_every_rank() -> None:
    (found,) = problems(Layout(cp_degree=4), seq_len=36)
    assert found == (
        "train.seq_len=36 is no multiple of 8: layout.cp_degree=4 gives every rank an early and a late chunk "
        "of each row, whose tokens layout.tp_degree=1 divides. "
        "Set seq_len to a multiple of 8, or lower a degree."
    )
    assert "is no multiple of 16" in problems(Layout(cp_degree=4, tp_degree=4), seq_len=24)[0]


def test_rows_must_divide_over_tensor_ranks() -> None:
    (found,) = problems(Layout(tp_degree=4), seq_len=34)
    assert found == (
        "train.seq_len=34 does not divide over layout.tp_degree=4, whose ranks hold equal parts of each row. "
        "Set seq_len to a multiple of 4, or lower tp_degree."
    )


def test_the_parts_of_all_ranks_cover_every_parameter_equally_often() -> None:
    layout = Layout(dp_degree=2, cp_degree=2, tp_degree=2, ep_degree=4)
    for param in parameters(NANO):
        parts = [box(param, layout, layout.place(rank)) for rank in range(layout.ranks)]
        held = sum(math.prod(piece.stop - piece.start for piece in part) for part in parts)
        divided = 4 if "expert" in param.axes else 2 if {"heads", "ffn"} & {*param.axes} else 1
        assert held == layout.ranks // divided * param.numel, param.name
