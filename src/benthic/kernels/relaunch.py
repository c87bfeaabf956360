# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Launches of kernels that were launched before, with half the work for the host.

Triton looks at every argument of a launch to find what it has compiled for such arguments. Training launches
the same kernels with the same sizes and other tensors more than a thousand times a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction, driver

from benthic.kernels.table import triton_interprets

_CONSTANTS = frozenset((int, float, bool, str, type(None), NVMMASharedLayout))
_MOST = 1024


def remembered(kernel):
    """A kernel whose launches with like arguments find what Triton compiled for the first of them.

    Whatever Triton compiles for is part of what is compared: the device; of tensors the dtype and whether
    they begin at a multiple of 16 bytes; of descriptors dtype, block and layout; numbers, but of floats and
    of integers that are not specialised the type; constants and options. Launches that are hooked into or
    replaced, as profilers and traces without a GPU do, are Triton's.
    """
    if triton_interprets() or torch.version.hip is not None:
        return kernel
    known: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
    hooks, kinds = knobs.runtime, [_kind_of(param) for param in kernel.params]

    def run(*args, grid, warmup, **options):
        watched = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        if warmup or watched or JITFunction.run.__module__ != JITFunction.__module__:
            return JITFunction.run(kernel, *args, grid=grid, warmup=warmup, **options)
        device = driver.active.get_current_device()
        like = [kind(x) for kind, x in zip(kinds, args, strict=False)]
        key = (device, *like, *options, *options.values(), *map(type, options.values()))
        found = known.get(key)
        if found is None:
            for value in options.values():
                _constant(value)
            compiled = JITFunction.run(kernel, *args, grid=grid, warmup=False, **options)
            if len(known) >= _MOST:
                known.clear()
            known[key] = compiled, [options.get(p.name, p.default) for p in kernel.params[len(args) :]]
            return compiled
        compiled, rest = found
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        compiled.run(
            x, y, z, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
            None, None, None, *args, *rest,
        )  # fmt: skip
        return compiled

    kernel.run = run
    return kernel


def _kind_of(param):
    if param.is_constexpr:
        return _constant
    return _unspecialised if param.do_not_specialize else _kind


def _kind(x):
    if x.__class__ is int:
        return x
    if isinstance(x, Tensor):
        return (x.dtype, "apart") if x.data_ptr() % 16 else x.dtype
    if x.__class__ is TensorDescriptor:
        return x.base.dtype, *x.block_shape, x.layout, x.padding
    return float if x.__class__ is float else _constant(x)


def _unspecialised(x):
    return int if x.__class__ is int and x.bit_length() < 32 else _kind(x)


def _constant(x):
    """With its type, for 1, 1.0 and True are equal."""
    if x.__class__ not in _CONSTANTS:
        message = f"launches are not remembered by a {type(x).__name__}, which may change."
        raise TypeError(message)
    return x.__class__, x
