"""A mixture's routed experts as one step of autograd: copies of tokens go out, and their sum comes back.

    h_r = SwiGLU(x_t W_1^T)      out_t = sum_k w_tk h_r W_2^T      r = row of copy k of token t

    backward    da_r = dout_t W_2                      without weights
                dw_tk = h_r . da_r                     what experts gave is neither kept nor computed again
                dW_2 = dout_t^T (w_tk h_r)
                dx_t = sum_k (SwiGLU'(h_r, w_tk da_r)) W_1

With one step for each of copying, network and summing, rows are copied wide and each copy is brought into the
form that products read. Here tokens are, once, before they are copied: the report sends them to experts in
FP8, and the gradient of the output likewise (section 3.3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benthic.kernels import ops
from benthic.kernels.ops import RowMaps

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.products import CopyProducts, WeightGradients


@dataclass(frozen=True)
class JoinedExperts:
    """See `benthic.model.sockets.Mixture`.

    Shapes: gate_up [E, 2F, D], down [E, D, F].
    """

    gate_up: Tensor
    down: Tensor
    products: CopyProducts
    sink: WeightGradients

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, beside: tuple[Tensor, ...]
    ) -> Tensor:
        """Sort copies by expert, then all of it."""
        ends_E, row_TK, copy_R = ops.place_copies(
            expert_TK, first=0, experts=self.gate_up.shape[0], rows=expert_TK.numel()
        )
        places = ends_E, row_TK, copy_R
        out_TD: Tensor = _Joined.apply(x_TD, weight_TK, self.gate_up, self.down, places, self, *beside)
        return out_TD


class _Joined(torch.autograd.Function):
    """Forward computes the sum; backward dx and dw, and hands the sink a call for each weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        places: tuple[Tensor, Tensor, Tensor],
        joined: JoinedExperts,
        *beside: Tensor,
    ) -> Tensor:
        """Keep rows, gates with ups, and their SwiGLU; of what experts give nothing."""
        products, dtype = joined.products, x_TD.dtype
        ends_E, row_TK, copy_R = places
        rows = products.spread(products.keep_rows(x_TD, None), row_TK)
        first, second = products.keep_weight(gate_up), products.keep_weight(down)
        gate_up_RF2 = products.output(rows, first, ends_E, dtype=dtype)
        hidden = products.keep_hidden(gate_up_RF2)
        parts = second, hidden, (gate_up_RF2,), first, rows
        ctx.save_for_backward(weight_TK, *places, *(tensor for part in parts for tensor in part))
        ctx.lengths, ctx.dtype = tuple(map(len, parts)), dtype
        # Not saved: they are leaves or views, whose graphs a deferred gradient walks after this one is freed.
        ctx.weights, ctx.joined, ctx.beside = (gate_up, down), joined, len(beside)
        rows_RD = products.output(hidden, second, ends_E, dtype=dtype)
        return ops.unpermute(rows_RD, RowMaps(row_TK, copy_R), weight_TK, beside)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of tokens and of their weights at once, those of experts' weights as the sink decides."""
        products, sink, dtype = ctx.joined.products, ctx.joined.sink, ctx.dtype
        gate_up, down = ctx.weights
        (dout_TD,) = grads
        weight_TK, ends_E, row_TK, copy_R, *kept = ctx.saved_tensors
        parts = iter(kept)
        second, hidden, wide, first, rows = (tuple(next(parts) for _ in range(n)) for n in ctx.lengths)
        ctx.maybe_clear_saved_tensors()  # each may go as soon as it was read for the last time
        del kept, parts
        for_da, for_ddown = products.keep_copies_gradient(dout_TD, row_TK, ends_E)
        da_RF = products.input_gradient(for_da, second, ends_E, dtype=dtype)
        weight_R = weight_TK.flatten()[copy_R]
        dx_TD = dgate_up = ddown = None
        if ctx.needs_input_grad[3]:
            hidden = products.weighted(hidden, weight_R)
            ddown = sink.take(down, partial(products.weight_gradient, for_ddown, hidden, ends_E))
        del for_da, for_ddown, hidden
        for_dx, for_dgate_up, dweight_R = products.keep_weighted_gradient(*wide, da_RF, weight_R, ends_E)
        del da_RF, wide
        if ctx.needs_input_grad[0]:
            drows_RD = products.input_gradient(for_dx, first, ends_E, dtype=dtype)
            dx_TD = ops.sum_copies(drows_RD, row_TK)
            del drows_RD
        if ctx.needs_input_grad[2]:
            dgate_up = sink.take(gate_up, partial(products.weight_gradient, for_dgate_up, rows, ends_E))
        dweight_TK = dweight_R[row_TK].to(weight_TK.dtype)
        return dx_TD, dweight_TK, dgate_up, ddown, None, None, *[dout_TD] * ctx.beside
