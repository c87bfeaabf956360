"""Flat ranges as boxes, and whether what all ranks own is every element once, for every layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.parallel.boxes import boxes_of_range
from benthic.parallel.buckets import Piece
from benthic.parallel.held import Held, copy_to_host
from benthic.spec import presets
from benthic.spec.layout import Layout, box
from benthic.spec.parameters import parameters


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@settings(max_examples=200, deadline=None)
@given(ranges())
def test_boxes_laid_end_to_end_are_the_range(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    whole = torch.arange(math.prod(shape)).view(shape)
    boxes = list(boxes_of_range(shape, start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    parts = [whole]
    for one in boxes:
        inside = tuple(slice(o, o + s) for o, s in zip(one.offsets, one.sizes, strict=True))
        assert one.numel == whole[inside].numel() > 0
        parts.append(whole[inside])
    found = torch.cat([part.flatten() for part in parts[1:]] or [whole.flatten()[:0]])
    assert found.tolist() == list(range(start, stop))


def test_three_dims_need_five_boxes_at_worst() -> None:
    assert [(b.offsets, b.sizes) for b in boxes_of_range((4, 3, 5), 7, 53)] == [
        ((0, 1, 2), (1, 1, 3)),
        ((0, 2, 0), (1, 1, 5)),
        ((1, 0, 0), (2, 3, 5)),
        ((3, 0, 0), (1, 1, 5)),
        ((3, 1, 0), (1, 1, 3)),
    ]


def held_by(param, layout: Layout, rank: int, ranks: list[int]) -> Held:
    """What `rank` holds of a parameter that is cut over the `ranks` with the same part of it."""
    local = box(param, layout, layout.place(rank))
    shape = tuple(part.stop - part.start for part in local)
    width = -(-math.prod(shape) // len(ranks))
    start = min(ranks.index(rank) * width, math.prod(shape))
    stop = min(start + width, math.prod(shape))
    values = torch.arange(param.numel).view(param.shape)[local].flatten()[start:stop]
    piece = Piece(param.name, shape, start, stop, values, values, running=None)
    return Held.piece(param.shape, local, piece, values, owned=True)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_degree=3),
        Layout(dp_degree=4, ep_degree=4),
        Layout(dp_degree=2, tp_degree=2, ep_degree=2),
        Layout(dp_degree=3, cp_degree=2, tp_degree=2, ep_degree=4),
    ],
    ids=lambda layout: f"dp{layout.dp_degree}cp{layout.cp_degree}tp{layout.tp_degree}ep{layout.ep_degree}",
)
def test_all_ranks_of_a_stage_hold_every_element_once(layout: Layout) -> None:
    for param in parameters(presets.get("nano")):
        alike: dict[object, list[int]] = {}
        for rank in range(layout.ranks):
            alike.setdefault(str(box(param, layout, layout.place(rank))), []).append(rank)
        found = torch.full(param.shape, -1)
        for ranks in alike.values():
            for rank in ranks:
                held = held_by(param, layout, rank, ranks)
                for one in held.boxes:
                    values = held.chunk(one.offsets)
                    inside = tuple(slice(o, o + s) for o, s in zip(one.offsets, one.sizes, strict=True))
                    assert (found[inside] == -1).all(), (param.name, one)
                    found[inside] = values
                    assert values.untyped_storage().data_ptr() == held.flat.untyped_storage().data_ptr()
        assert torch.equal(found.flatten(), torch.arange(param.numel)), param.name


def test_copies_on_the_host_keep_their_values_and_their_memory() -> None:
    weights, mirror = torch.ones(6), torch.ones(2)
    held = {"w": Held.whole(weights), "copy": Held((2,), (), mirror, owned=False)}
    buffers: dict[str, torch.Tensor] = {}
    first = copy_to_host(held, buffers)
    assert set(first) == {"w"}
    place = buffers["w"].data_ptr()
    weights.add_(1)
    assert torch.equal(first["w"].flat, torch.ones(6))
    assert copy_to_host(held, buffers)["w"].flat.data_ptr() == place
    assert torch.equal(buffers["w"], torch.full((6,), 2.0))


def test_masters_in_halves_are_read_and_written_box_by_box_as_float32() -> None:
    torch.manual_seed(0)
    masters = torch.randn(4 * 3 * 5)
    halves = (torch.empty_like(masters, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    weight, remainder = (half[7:53] for half in halves)
    piece = Piece("w", (4, 3, 5), 7, 53, remainder, masters[7:53].clone(), running=weight)
    held = Held.piece((4, 3, 5), [slice(0, 4), slice(0, 3), slice(0, 5)], piece, piece.kept, owned=True)
    assert (held.dtype, held.nbytes) == (torch.float32, 46 * 4)
    assert Held.piece((4, 3, 5), [slice(0, 4)] * 3, piece, piece.gradient, owned=True).weight is None
    whole = masters.view(4, 3, 5)
    for one in held.boxes:
        sides = tuple(slice(o, o + s) for o, s in zip(one.offsets, one.sizes, strict=True))
        for half in (slice(None, 2), slice(2, None)):
            held.write(one.offsets, (..., half), whole[sides][..., half])
        assert torch.equal(held.chunk(one.offsets), whole[sides])
    assert torch.equal(piece.master, masters[7:53])
    assert torch.equal(piece.part(3, 9).master, masters[10:19])
    copy = copy_to_host({"w": held}, {})["w"]
    assert torch.equal(copy.flat, masters[7:53])
    assert copy.weight is None
