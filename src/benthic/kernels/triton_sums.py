"""A kernel that adds narrow gradients to float32 sums: torch's loses its vectors where dtypes differ."""

from __future__ import annotations

import triton
import triton.language as tl
from torch.nn import functional as F

from benthic.kernels.host import cdiv
from benthic.kernels.reference.moe import squares_of
from benthic.kernels.relaunch import remembered

_BLOCK = 4096


@remembered
@triton.jit
def _accumulate(sum_ptr, x_ptr, count, FRESH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if not FRESH:
        x += tl.load(sum_ptr + at, mask=mask, other=0.0)
    tl.store(sum_ptr + at, x, mask=mask)


def accumulate(into, x, *, fresh=False):
    """See `benthic.kernels.ops.accumulate`; both are contiguous."""
    count = x.numel()
    if count:
        grid = (cdiv(count, _BLOCK),)
        _accumulate[grid](into, x, count, FRESH=fresh, BLOCK=_BLOCK, num_warps=8)


def add_grouped_mm(into, dy_RO, x_RI, ends_E, *, fresh, squares=False):
    """See `benthic.kernels.ops.add_weight_gradient`: rounded to the operands' dtype, then added."""
    gradient = F.grouped_mm(dy_RO.contiguous().t(), x_RI, offs=ends_E)
    accumulate(into, gradient, fresh=fresh)
    return squares_of(into) if squares else None
