"""A product that is added to a sum wider than its operands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def add_product(
    out: Tensor, left: Tensor, right: Tensor, *, factor: float = 1.0, fresh: bool = False
) -> None:
    """`out += factor * left @ right`, in place and in out's dtype, which may be wider than that of the rest.

    With `fresh`, written whatever `out` held. CUDA adds in the product's epilogue, so that `out` is read and
    written once and nothing is rounded before. A CPU has no such product: operands are widened there.
    """
    beta = 0.0 if fresh else 1.0
    if out.dtype == left.dtype:
        out.addmm_(left, right, beta=beta, alpha=factor)
    elif not out.is_cpu:
        torch.addmm(out, left, right, beta=beta, alpha=factor, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=beta, alpha=factor)
