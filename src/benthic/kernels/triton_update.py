"""The optimizer's update as one kernel: everything is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _adamw(
    master_ptr, gradient_ptr, first_ptr, second_ptr, count,
    fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    gradient = tl.load(gradient_ptr + at, mask=mask, other=0.0) * scale
    first = tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
    master = tl.load(master_ptr + at, mask=mask, other=0.0)
    first += (gradient - first) * fresh1
    second = second * beta2 + gradient * gradient * fresh2
    master = master * (1.0 - decay) - step_size * first / (tl.sqrt(second / correction) + eps)
    tl.store(master_ptr + at, master, mask=mask)
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=mask)


def adamw(master, gradient, first, second, by):
    """See `benthic.kernels.ops.adamw`."""
    count = master.numel()
    _adamw[(triton.cdiv(count, _BLOCK),)](
        master, gradient, first, second, count,
        1.0 - by.beta1, by.beta2, 1.0 - by.beta2, by.eps, by.step_size, by.decay, by.correction, by.scale,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
