"""Mixture-of-experts ops through torch calls, with hand-written gradients.

`grouped_mm` is torch's grouped product (CUDA and CPU); `loop` calls one product an expert, for widths that
`grouped_mm` refuses. `permute` and `unpermute` move rows by gathers in both directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from benthic.kernels.grouped_mm import GroupedMm
from benthic.kernels.reference.moe import Permuted, RowMaps, added, followed, row_maps
from benthic.kernels.reference.norm import wide

if TYPE_CHECKING:
    from torch import Tensor


def permute(x_TD: Tensor, expert_TK: Tensor, num_experts: int, slot_T: Tensor | None = None) -> Permuted:
    """See `benthic.kernels.ops.permute`."""
    ends_E, maps = row_maps(followed(expert_TK, slot_T), num_experts)
    rows_RD: Tensor = _Gather.apply(x_TD, maps.row_TK, maps.copy_R)
    return Permuted(rows_RD, ends_E, maps)


def unpermute(rows_RD: Tensor, maps: RowMaps, weight_TK: Tensor, beside: tuple[Tensor, ...] = ()) -> Tensor:
    """See `benthic.kernels.ops.unpermute`; narrow rows are summed in float32."""
    return added(_WeightedSum.apply(rows_RD, weight_TK, maps.row_TK, maps.copy_R), beside)


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """See `benthic.kernels.ops.gate_logits`; CUDA, where a product may leave in a wider dtype."""
    return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)


def gate_gradients(dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.gate_gradients`: what bfloat16 leaves of the gradient is multiplied too."""
    both_TF = halves(dlogits_TE)
    dx_TD = both_TF @ torch.cat((weight_ED, weight_ED))
    parts_FD = torch.mm(both_TF.t(), x_TD, out_dtype=torch.float32)
    return dx_TD, torch.add(*parts_FD.chunk(2), out=torch.empty_like(weight_ED))


def halves(x_TE: Tensor) -> Tensor:
    """What bfloat16 keeps of float32, and beside it what it leaves of the rest: bfloat16 [T, 2 E]."""
    tokens, experts = x_TE.shape
    both_TF = torch.empty(tokens, 2 * experts, dtype=torch.bfloat16, device=x_TE.device)
    high_TE, low_TE = both_TF.chunk(2, dim=1)
    torch.sub(x_TE, high_TE.copy_(x_TE), out=low_TE)
    return both_TF


def grouped_mm(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """See `benthic.kernels.ops.grouped_linear`; needs rows of a multiple of 16 bytes."""
    out_RO: Tensor = GroupedMm.apply(x_RI, weight_EOI, ends_E, _library_product)
    return out_RO


def _library_product(x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return zero_tail(F.grouped_mm(x_RK, weight_ENK.transpose(1, 2), offs=ends_E), ends_E)


def loop(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """See `benthic.kernels.ops.grouped_linear`; one product an expert that has rows."""
    out_RO: Tensor = _Loop.apply(x_RI, weight_EOI, ends_E)
    return out_RO


class _Gather(torch.autograd.Function):
    """rows_r = x[token of r]; dx_t = sum over k of drows[row_tk], a gather too, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_TK: Tensor, copy_R: Tensor) -> Tensor:
        """Save where the copies went."""
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, copy_R // row_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Sum the gradients of a token's copies."""
        (row_TK,) = ctx.saved_tensors
        drows_TKD = grads[0].index_select(0, row_TK.flatten()).unflatten(0, row_TK.shape)
        return drows_TKD.sum(dim=1, dtype=wide(drows_TKD.dtype)).to(drows_TKD.dtype), None, None


class _WeightedSum(torch.autograd.Function):
    """out_t = sum_k w_tk rows[row_tk]; drows_r = w dout[token of r]; dw_tk = dout_t . rows[row_tk]."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, copy_R: Tensor) -> Tensor:
        """Save rows and weights."""
        ctx.save_for_backward(rows_RD, weight_TK, row_TK, copy_R)
        rows_TKD, acc = _copies(rows_RD, row_TK), wide(rows_RD.dtype)
        return torch.bmm(weight_TK.unsqueeze(1).to(acc), rows_TKD).squeeze(1).to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of rows and weights."""
        rows_RD, weight_TK, row_TK, copy_R = ctx.saved_tensors
        acc = wide(rows_RD.dtype)
        dout_TD = grads[0].to(acc)
        drows_RD = dweight_TK = None
        if ctx.needs_input_grad[0]:
            weight_R = weight_TK.flatten().index_select(0, copy_R).to(acc)
            drows_RD = dout_TD.index_select(0, copy_R // row_TK.shape[1]).mul_(weight_R.unsqueeze(1))
            drows_RD = drows_RD.to(rows_RD.dtype)
        if ctx.needs_input_grad[1]:
            rows_TKD = _copies(rows_RD, row_TK)
            dweight_TK = torch.bmm(rows_TKD, dout_TD.unsqueeze(2)).squeeze(2).to(weight_TK.dtype)
        return drows_RD, dweight_TK, None, None


def _copies(rows_RD: Tensor, row_TK: Tensor) -> Tensor:
    """Each token's rows side by side, in what they are summed in."""
    return rows_RD.index_select(0, row_TK.flatten()).unflatten(0, row_TK.shape).to(wide(rows_RD.dtype))


def zero_tail(rows: Tensor, ends_E: Tensor) -> Tensor:
    """Zero in place the rows past the last expert's end, which `grouped_mm` leaves unwritten (CPU)."""
    end = int(ends_E[-1])
    if end < rows.shape[0]:
        rows[end:] = 0
    return rows


def _slices(ends_E: Tensor) -> list[tuple[int, slice]]:
    """Experts that have rows, each with its rows."""
    found, start = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            found.append((expert, slice(start, end)))
        start = end
    return found


class _Loop(torch.autograd.Function):
    """One product an expert that has rows; everything else is zero."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Save the operands and where each expert's rows lie."""
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.slices = _slices(ends_E)
        out_RO = x_RI.new_zeros(x_RI.shape[0], weight_EOI.shape[1])
        for expert, rows in ctx.slices:
            torch.mm(x_RI[rows], weight_EOI[expert].t(), out=out_RO[rows])
        return out_RO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of rows and weights."""
        x_RI, weight_EOI = ctx.saved_tensors
        (dy_RO,) = grads
        dx_RI = torch.zeros_like(x_RI) if ctx.needs_input_grad[0] else None
        dweight_EOI = torch.zeros_like(weight_EOI) if ctx.needs_input_grad[1] else None
        for expert, rows in ctx.slices:
            if dx_RI is not None:
                torch.mm(dy_RO[rows], weight_EOI[expert], out=dx_RI[rows])
            if dweight_EOI is not None:
                torch.mm(dy_RO[rows].t(), x_RI[rows], out=dweight_EOI[expert])
        return dx_RI, dweight_EOI, None
