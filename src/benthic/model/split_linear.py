"""The `linear` socket of training: products as steps of autograd, whose weight gradients may wait.

A SwiGLU network is one step, so that what lies between its two products is never written wide:

    gates and ups   h  = x W_1^T          backward  dh = SwiGLU'(h, da), dx = dh W_1, dW_1 = dh^T x
    output          y  = SwiGLU(h) W_2^T  backward  da = dy W_2, dW_2 = dy^T SwiGLU(h)

Only `Products` know the form in which a product reads its operands. With one step for each of the two
products and one for SwiGLU, SwiGLU(h) and dh would each be written in the dtype of the rows and read again
to be brought into that form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benthic.model.mixture import JoinedExperts
from benthic.model.products import WeightGradients
from benthic.model.sockets import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.products import Products
    from benthic.model.sockets import Mixture


@dataclass(frozen=True)
class SplitLinear(Linear):
    """The `linear` socket whose weight gradients `sink` computes now or later."""

    products: Products
    sink: WeightGradients = field(default_factory=WeightGradients)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`, in the dtype of x."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y_RO: Tensor = _Split.apply(rows, weight, None, self)
        return y_RO if x.dim() == 2 else y_RO.view(*x.shape[:-1], weight.shape[0])

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`, in the dtype of the rows."""
        y_RO: Tensor = _Split.apply(rows_RI, weight_EOI, ends_E, self)
        return y_RO

    def network(self, x_RD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """`down(swiglu(gate_up(x_RD)))`, in the dtype of x, as one step of autograd."""
        y_RD: Tensor = _Gated.apply(x_RD, gate_up, down, ends_E, self)
        return y_RD

    def mixture(self, gate_up: Tensor, down: Tensor) -> Mixture | None:
        """As one step of autograd, where products read copies in a form that tokens can be brought into."""
        products = self.products.of_copies()
        return None if products is None else JoinedExperts(gate_up, down, products, self.sink)


class _Split(torch.autograd.Function):
    """Forward computes y; backward computes dx and hands the sink a call that computes dW."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, ends_E: Tensor | None, socket: SplitLinear) -> Tensor:
        """Keep rows for dW and the weight for dx, each in its product's form."""
        rows = socket.products.keep_rows(x_RI, ends_E)
        kept = socket.products.keep_weight(weight)
        for_dx = kept if ctx.needs_input_grad[0] else ()
        for_dweight = rows if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(ends_E, *for_dx, *for_dweight)
        ctx.split, ctx.dtype = len(for_dx) + 1, x_RI.dtype
        # Not saved: it is a leaf or a view, whose graph a deferred gradient walks after this one is freed.
        ctx.weight, ctx.socket = weight, socket
        return socket.products.output(rows, kept, ends_E, dtype=x_RI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The input gradient at once, the weight gradient as the sink decides."""
        products, sink = ctx.socket.products, ctx.socket.sink
        ends_E, *kept = ctx.saved_tensors
        weight, rows = tuple(kept[: ctx.split - 1]), tuple(kept[ctx.split - 1 :])
        for_dx, for_dweight = products.keep_gradient(grads[0], ends_E)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = products.input_gradient(for_dx, weight, ends_E, dtype=ctx.dtype)
        if ctx.needs_input_grad[1]:
            dweight = sink.take(ctx.weight, partial(products.weight_gradient, for_dweight, rows, ends_E))
        return dx, dweight, None, None


class _Gated(torch.autograd.Function):
    """Forward computes y; backward computes dx and hands the sink a call for each weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None, socket: SplitLinear
    ) -> Tensor:
        """Keep rows and gates with ups for the gradients, each in its product's form."""
        products, dtype = socket.products, x_RD.dtype
        rows = products.keep_rows(x_RD, ends_E)
        first, second = products.keep_weight(gate_up), products.keep_weight(down)
        gate_up_RF2 = products.output(rows, first, ends_E, dtype=dtype)
        hidden = products.keep_hidden(gate_up_RF2)
        of_x, of_gate_up, of_down = ctx.needs_input_grad[:3]
        parts = (
            second if of_x or of_gate_up else (),
            hidden if of_down else (),
            (gate_up_RF2,) if of_x or of_gate_up else (),
            first if of_x else (),
            rows if of_gate_up else (),
        )
        ctx.save_for_backward(ends_E, *(tensor for part in parts for tensor in part))
        ctx.lengths, ctx.dtype = tuple(map(len, parts)), dtype
        # Not saved: they are leaves or views, whose graphs a deferred gradient walks after this one is freed.
        ctx.weights, ctx.socket = (gate_up, down), socket
        return products.network_output(hidden, second, ends_E, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """The input gradient at once, the weight gradients as the sink decides."""
        products, sink, dtype = ctx.socket.products, ctx.socket.sink, ctx.dtype
        gate_up, down = ctx.weights
        ends_E, *kept = ctx.saved_tensors
        parts = iter(kept)
        second, hidden, wide, first, rows = (tuple(next(parts) for _ in range(n)) for n in ctx.lengths)
        ctx.maybe_clear_saved_tensors()  # each may go as soon as it was read for the last time
        del kept, parts
        dx = dgate_up = ddown = None
        for_da, for_ddown = products.keep_gradient(grads[0], ends_E)
        da_RF = products.input_gradient(for_da, second, ends_E, dtype=dtype) if wide else None
        if ctx.needs_input_grad[2]:
            ddown = sink.take(down, partial(products.weight_gradient, for_ddown, hidden, ends_E))
        del for_da, for_ddown, hidden
        if da_RF is not None:
            for_dx, for_dgate_up = products.keep_hidden_gradient(*wide, da_RF, ends_E)
            del da_RF, wide
            if ctx.needs_input_grad[0]:
                dx = products.input_gradient(for_dx, first, ends_E, dtype=dtype)
            if ctx.needs_input_grad[1]:
                dgate_up = sink.take(gate_up, partial(products.weight_gradient, for_dgate_up, rows, ends_E))
        return dx, dgate_up, ddown, None, None
