"""A step in two halves, for ranks that share experts: one computes while the other's rows travel.

DeepSeek-V3 report section 3.4: two microbatches with similar work, so that attention and experts of one run
beside dispatch and combine of the other. A half is the first rows of a step or the others. It may end inside
a chunk of a prompt, since in every layer the first half's latents are in the cache before the second half
attends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from benthic.model.network import Passed
from benthic.serve.steps import StepRows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from benthic.model.network import DeepSeek, Hidden
    from benthic.model.sockets import Sockets
    from benthic.sched.plans import Prefill


class Half(NamedTuple):
    """Tokens and positions of some rows of a step, and what they are computed with."""

    tokens_T: Tensor
    positions_T: Tensor
    sockets: Sockets


def run(model: DeepSeek, first: Half, second: Half) -> Hidden:
    """The whole network over both; the rows of the first half come first.

    Collectives start in the same order on every rank: of each mixture, dispatch of the first half and of the
    second, combine of the first and of the second.
    """
    x_1, x_2 = model.embed(first.tokens_T), model.embed(second.tokens_T)
    angles_1, angles_2 = model.rotary(first.positions_T), model.rotary(second.positions_T)
    coming = None
    for block in model.blocks:
        sent_1 = block.dispatch(block.attention(x_1, angles_1, first.sockets), first.sockets)
        if coming is not None:
            x_2 = coming[0].combine(coming[1], second.sockets)
        sent_2 = block.dispatch(block.attention(x_2, angles_2, second.sockets), second.sockets)
        computed_1 = block.experts(sent_1, first.sockets)
        coming = block, block.experts(sent_2, second.sockets)
        x_1 = block.combine(computed_1, first.sockets)
    if coming is not None:
        x_2 = coming[0].combine(coming[1], second.sockets)
    return model.finish(Passed(torch.cat((x_1, x_2)), ()))


def first_rows(rows: StepRows) -> int:
    """How many rows of a step are its first half, no sequence's drafts apart; 0: it has no halves."""
    cut = len(rows.position_T) // 2
    decoding = len(rows.index_R)
    return cut if cut >= decoding or rows.decode is None else cut - cut % rows.decode.queries


def divide(rows: StepRows, cut: int) -> tuple[StepRows, StepRows]:
    """The first `cut` rows and the others; neither says which rows are sampled."""
    decoding = min(cut, len(rows.index_R))
    first, second, left = [], [], cut - len(rows.index_R)
    for chunk, given in zip(rows.chunks, rows.given, strict=True):
        here = min(max(left, 0), chunk.length)
        left -= chunk.length
        if here:
            first.append((chunk._replace(length=here, samples=False), given[:here]))
        if here < chunk.length:
            rest = chunk._replace(start=chunk.start + here, length=chunk.length - here)
            second.append((rest, given[here:]))
    return _part(rows, slice(0, cut), slice(0, decoding), first), _part(
        rows, slice(cut, None), slice(decoding, None), second
    )


def _part(
    rows: StepRows, own: slice, decoding: slice, chunks: list[tuple[Prefill, NDArray[np.int64]]]
) -> StepRows:
    decode = rows.decode
    if decode is not None:
        seqs = slice(
            *(None if end is None else end // decode.queries for end in (decoding.start, decoding.stop))
        )
        slot_S = decode.slot_S[seqs]
        decode = replace(decode, slot_S=slot_S, context_S=decode.context_S[seqs]) if len(slot_S) else None
    return StepRows(
        index_R=rows.index_R[decoding],
        given=[given for _, given in chunks],
        position_T=rows.position_T[own],
        slot_T=rows.slot_T[own],
        decode=decode,
        chunks=[chunk for chunk, _ in chunks],
        sampled_S=None,
        chunk_rows=(),
    )
