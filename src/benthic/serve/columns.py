"""Weights as a CPU server wants them: stored column by column, and a `linear` socket that reads them so.

The native product multiplies such weights without copying them first (`kernels/native_c/product.c`); tapes
copy them into panels once. Shapes and values of the parameters do not change, only their strides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.kernels.native import build_refusal
from benthic.kernels.native_ops import linear as native_linear
from benthic.model.joined import latent_pairs, lay_together
from benthic.model.local import plain_linear
from benthic.model.sockets import Linear
from benthic.serve.table_linear import TableLinear

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.network import DeepSeek

FEW_ROWS: Final = 16
"""Up to here the native product is as fast as the blocked one of torch's library, which is called above."""

SOCKET_WEIGHTS: Final = (
    "attn.q.weight",
    "attn.q_a.weight",
    "attn.q_b.weight",
    "attn.kv_a.weight",
    "attn.o.weight",
    "gate_up.weight",
    "down.weight",
    "experts.gate_up",
    "experts.down",
    "head.weight",
)
"""Ends of the names of all weights that go through the `linear` socket and nowhere else."""


class ColumnLinear(Linear):
    """Products with weights that `lay_out` stored; others are multiplied as `plain_linear` does."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        if weight.stride(0) == 1 and x.dim() == 2 and x.shape[0] <= FEW_ROWS:
            return native_linear(x, weight)
        return F.linear(x, weight)

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`."""
        return ops.grouped_linear(rows_RI, weight_EOI, ends_E)


def fastest_linear(model: DeepSeek) -> Linear:
    """The `linear` socket for serving this model where it is.

    On a CPU in float32, with a C compiler, its weights are laid out anew; on a GPU in bfloat16 latents'
    weights are put behind queries', and the table of kernels is asked for products of few rows; elsewhere it
    is `plain_linear`.
    """
    weight = model.head_weight()
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        for weights in latent_pairs(model):
            lay_together(weights)
        return TableLinear()
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or build_refusal() is not None:
        return plain_linear
    lay_out(model)
    return ColumnLinear()


def lay_out(model: DeepSeek) -> None:
    """Store the socket's weights column by column, in place, one at a time."""
    for name, weight in model.named_parameters():
        if name.endswith(SOCKET_WEIGHTS):
            grouped = ".experts." in name
            rows_EOI = weight.data.flatten(1, -2) if grouped else weight.data.flatten(0, -2).unsqueeze(0)
            weight.data = rows_EOI.transpose(1, 2).contiguous().transpose(1, 2).view(weight.shape)
