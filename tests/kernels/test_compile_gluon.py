"""Gluon kernels compile for Hopper without a GPU: nothing spills, and powers are computed beside products."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from benthic.kernels import gluon_attention

POINTERS = {
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "starts_q_ptr": "*i32",
    "starts_k_ptr": "*i32",
    "scale": "fp32",
}


def compiled(width, value):
    """Causal attention in bfloat16 as a launch would compile it."""
    d_1, d_2 = gluon_attention.split_width(width)

    def descriptor(rows, columns):
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
        return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

    constants = {
        "HEADS": 16,
        "GROUPS": 1,
        "D_1": d_1,
        "D_2": d_2,
        "V": value,
        "CAUSAL": True,
        "BLOCK_M": gluon_attention.QUERIES,
        "BLOCK_N": gluon_attention.KEYS,
        "STAGES": gluon_attention.STAGES,
        "REGISTERS": gluon_attention.CONSUMER_REGISTERS,
        "FEW_REGISTERS": gluon_attention.PRODUCER_REGISTERS,
    }
    types = POINTERS | {"q_1": descriptor(64, d_1), "q_2": descriptor(64, d_2 or d_1)}
    types |= {"k_1": descriptor(128, d_1), "k_2": descriptor(128, d_2 or d_1), "v": descriptor(128, value)}
    names = gluon_attention._forward.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    fixed = {(names.index(name),): constant for name, constant in constants.items()}
    return triton.compile(
        GluonASTSource(gluon_attention._forward, signature, fixed, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": gluon_attention.ENTRY_REGISTERS},
    )


def tool(built, option, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def test_attention_keeps_its_products_in_flight_and_its_weights_in_registers(tmp_path):
    built = compiled(192, 128)
    used = dict(re.findall(r"(STACK|LOCAL):(\d+)", tool(built, "-res-usage", tmp_path)))
    assert used == {"STACK": "0", "LOCAL": "0"}
    assert built.metadata.shared <= 227 * 1024
    text = tool(built, "-sass", tmp_path)
    assert "UTMALDG" in text
    assert "USETMAXREG.TRY_ALLOC" in text
    order = [
        "wait" + found.group(1) if found.group(1) else found.group(0)
        for found in re.finditer(r"MUFU\.EX2|DEPBAR\.LE gsb0, 0x([01])", text)
    ]
    loops = [at for at, what in enumerate(order) if what == "wait1"]
    assert len(loops) == 4  # cut blocks and whole ones, in two groups of warps
    for at in loops:  # powers between the wait for scores and the wait for the other product
        assert order[at + 1 : at + 65] == ["MUFU.EX2"] * 64
        assert "wait0" in order[at + 65 : at + 70]
