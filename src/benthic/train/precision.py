"""What numbers are kept in: products of the `linear` socket, and running weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.model.local import plain_linear

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.sockets import Linear
    from benthic.train.config import PrecisionConfig

DTYPES: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CastLinear:
    """Products in `dtype`, whatever the operands are kept in; results return to the dtype of the rows."""

    dtype: torch.dtype

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        return F.linear(x.to(self.dtype), weight.to(self.dtype)).to(x.dtype)

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`."""
        out_RO = ops.grouped_linear(rows_RI.to(self.dtype), weight_EOI.to(self.dtype), ends_E)
        return out_RO.to(rows_RI.dtype)


def linear_socket(config: PrecisionConfig) -> Linear:
    """The socket for products in `matmul` of weights kept in `weights`."""
    same = config.weights == config.matmul
    return plain_linear if same else CastLinear(DTYPES[config.matmul])
