"""The optimizer's update as one kernel: everything is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import TILE
from benthic.kernels.triton_e4m3 import scaled, spread, tile_scale
from benthic.kernels.triton_hash import drawn

_BLOCK = 2048


@triton.jit
def _moved(
    master, gradient_ptr, first_ptr, second_ptr, at, mask,
    fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
):  # fmt: skip
    """Update the moments `at` and return the new masters."""
    gradient = tl.load(gradient_ptr + at, mask=mask, other=0.0) * scale
    first = tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
    first += (gradient - first) * fresh1
    second = second * beta2 + gradient * gradient * fresh2
    master = master * (1.0 - decay) - step_size * first / (tl.sqrt(second / correction) + eps)
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=mask)
    return master


@triton.jit
def _update(
    master_ptr, gradient_ptr, first_ptr, second_ptr, at, mask,
    fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
):  # fmt: skip
    """Update the elements `at` and return their masters."""
    master = _moved(
        tl.load(master_ptr + at, mask=mask, other=0.0), gradient_ptr, first_ptr, second_ptr, at, mask,
        fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    )  # fmt: skip
    tl.store(master_ptr + at, master, mask=mask)
    return master


@triton.jit
def _adamw(
    master_ptr, gradient_ptr, first_ptr, second_ptr, running_ptr, count,
    fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    master = _update(
        master_ptr, gradient_ptr, first_ptr, second_ptr, at, at < count,
        fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    )  # fmt: skip
    if ROUND:
        tl.store(running_ptr + at, master.to(running_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _adamw_split(
    weight_ptr, remainder_ptr, gradient_ptr, first_ptr, second_ptr, count,
    fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights are bits in int16; `reference.update.split_master` has the rule."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    high = tl.load(weight_ptr + at, mask=mask, other=0).to(tl.int32)
    bits = (high << 16) + tl.load(remainder_ptr + at, mask=mask, other=0).to(tl.int32)
    master = _moved(
        bits.to(tl.float32, bitcast=True), gradient_ptr, first_ptr, second_ptr, at, mask,
        fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    )  # fmt: skip
    bits = master.to(tl.int32, bitcast=True)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    high = tl.where(nan, 0x7FC0, (bits + 0x8000) >> 16)
    tl.store(weight_ptr + at, high.to(tl.int16), mask=mask)
    tl.store(remainder_ptr + at, (bits - (high << 16)).to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["seed"])
def _adamw_of_blocks(
    master_ptr, gradient_ptr, first_ptr, second_ptr, values_ptr, scale_ptr, outer, inner, seed,
    fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
    POWER_OF_TWO: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Update a block of one matrix in parts; then scale and round it, read again from the cache."""
    matrix, outer_tile, inner_tile = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    column = inner_tile * TILE + tl.arange(0, TILE)
    amax = 0.0
    for first in range(0, TILE, PART):
        row = outer_tile * TILE + first + tl.arange(0, PART)
        mask = (row < outer)[:, None] & (column < inner)[None, :]
        at = (matrix * outer + row)[:, None] * inner + column[None, :]
        master = _update(
            master_ptr, gradient_ptr, first_ptr, second_ptr, at, mask,
            fresh1, beta2, fresh2, eps, step_size, decay, correction, scale,
        )  # fmt: skip
        magnitude = tl.where(mask, tl.abs(master), 0.0)
        amax = tl.maximum(amax, tl.max(tl.max(magnitude, axis=1), axis=0))
    own = tile_scale(amax, POWER_OF_TWO)
    tiles = tl.cdiv(inner, TILE)
    tl.store(scale_ptr + (matrix * tl.cdiv(outer, TILE) + outer_tile) * tiles + inner_tile, own)
    tl.debug_barrier()
    for first in range(0, TILE, PART):
        row = outer_tile * TILE + first + tl.arange(0, PART)
        mask = (row < outer)[:, None] & (column < inner)[None, :]
        at = (matrix * outer + row)[:, None] * inner + column[None, :]
        values = scaled(tl.load(master_ptr + at, mask=mask, other=0.0), own)
        if STOCHASTIC:
            within = tl.minimum(tl.maximum(values, -448.0), 448.0)
            values = spread(within, drawn(seed.to(tl.int64), at))
        tl.store(values_ptr + at, values.to(tl.float8e4nv), mask=mask)


def adamw(master, gradient, first, second, by, running):
    """See `benthic.kernels.ops.adamw`."""
    count = master.numel()
    _adamw[(cdiv(count, _BLOCK),)](
        master, gradient, first, second, master if running is None else running, count, *_numbers(by),
        ROUND=running is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def adamw_split(weight, remainder, gradient, first, second, by):
    """See `benthic.kernels.ops.adamw_split`."""
    count = weight.numel()
    _adamw_split[(cdiv(count, _BLOCK),)](
        weight.view(torch.int16), remainder, gradient, first, second, count, *_numbers(by),
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def adamw_fp8(master, gradient, first, second, by, copy, *, power_of_two, seed):
    """See `benthic.kernels.ops.adamw_fp8`."""
    *matrices, outer, inner = master.shape
    grid = (cdiv(inner, TILE), cdiv(outer, TILE), *(matrices or (1,)))
    if master.numel():
        _adamw_of_blocks[grid](
            master, gradient, first, second, *copy, outer, inner, 0 if seed is None else seed, *_numbers(by),
            POWER_OF_TWO=power_of_two, STOCHASTIC=seed is not None, TILE=TILE, PART=16, num_warps=8,
        )  # fmt: skip


def _numbers(by):
    return (
        1.0 - by.beta1, by.beta2, 1.0 - by.beta2, by.eps, by.step_size, by.decay, by.correction, by.scale
    )  # fmt: skip
