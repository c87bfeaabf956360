"""Every Triton kernel compiles for Hopper without a GPU; products use wgmma and nothing spills registers."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOATS = {"eps", "scale", "sign"}
INT64 = {"row_ptr", "copy_ptr", "slot_ptr"}
INT32 = {"ends_ptr", "table_ptr", "context_ptr", "starts_q_ptr", "starts_k_ptr"}
FLOAT32 = {
    "rstd_ptr",
    "dweight_ptr",
    "lse_ptr",
    "delta_ptr",
    "cos_ptr",
    "sin_ptr",
    "weight_TK_ptr",
    "scale_ptr",
    "part_ptr",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def argument_type(name, dtype, overrides):
    if name in overrides:
        return overrides[name]
    if not name.endswith("_ptr"):
        return "fp32" if name in FLOATS else "i32"
    if name in INT64:
        return "*i64"
    if name in INT32:
        return "*i32"
    if name in FLOAT32:
        return "*fp32"
    return f"*{dtype}"


def compiled(module, kernel, constants, *, dtype="bf16", warps=4, stages=3, overrides=None):
    """Compile as a launch with 16-byte aligned pointers and strides would; returns (ptx, resource usage)."""
    function = getattr(importlib.import_module(f"benthic.kernels.{module}"), kernel)
    names = function.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = argument_type(name, dtype, overrides or {})
        if name.endswith("_ptr") or "stride" in name or name.endswith("_dim") or name in ("width", "columns"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, constexprs, attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return built


def resources(built, tmp_path):
    """Registers, spilled bytes (stack and local) and shared memory of a compiled kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    numbers["shared"] = built.metadata.shared
    return numbers
