# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Kernels that are launched before the one ahead of them has ended (programmatic dependent launch, Hopper).

In a step of few rows a kernel works for two microseconds, and starting the next takes one more. A kernel
launched with `early` may be put on the GPU while the one ahead still runs; it waits there, in its first line,
until that one has ended and what it wrote can be seen. A kernel that waits has seen everything before it end,
so one that follows may count on that too. The order of memory accesses, and so every result, is the same.
CUDA graphs keep the way of launching; ahead of a kernel that knows nothing of it, it ends as always.
"""

from __future__ import annotations

import contextlib
import functools
import os
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

from benthic.kernels.table import triton_interprets

FEW_ROWS = 4096
"""Rows up to which kernels are launched early. More fill a GPU: what waits there would be in their way."""

# A switch for comparisons, of the whole process: kernels are launched far from any options.
_wanted = ContextVar("early launches", default=os.environ.get("BENTHIC_PDL", "1") != "0")  # noqa: TID251


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel start, then wait for all that came before.

    No store may come before it, and no load but of weights: kernels that write those are not launched early
    themselves, and let none start before they have ended.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def early(device, rows):
    """Launch keywords of a kernel that calls `wait_for_inputs(PDL)` and works on so many rows."""
    if rows <= FEW_ROWS and device.type == "cuda" and _wanted.get() and _possible(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@contextlib.contextmanager
def in_turn():
    """Launch kernels one after the other meanwhile, as `BENTHIC_PDL=0` in the environment does throughout."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


@functools.cache
def _possible(device):
    """Whether a GPU is of NVIDIA and at least a Hopper, and kernels are compiled for it."""
    capable = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return capable and not triton_interprets()
