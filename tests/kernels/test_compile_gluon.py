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

from benthic.kernels import gluon_attention, gluon_mla

POINTERS = {
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "starts_q_ptr": "*i32",
    "starts_k_ptr": "*i32",
    "latent_ptr": "*bf16",
    "rope_ptr": "*bf16",
    "table_ptr": "*i32",
    "context_ptr": "*i32",
    "part_ptr": "*fp32",
    "most_ptr": "*fp32",
    "total_ptr": "*fp32",
    "scale": "fp32",
}


def descriptor(rows, columns):
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"


def compiled(kernel, constants, descriptors, registers):
    """Compile as a launch with 16-byte aligned pointers and strides would."""
    names, types = kernel.arg_names, POINTERS | descriptors
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    fixed = {(names.index(name),): constant for name, constant in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name.endswith("_ptr") or name.startswith("stride_")
    }
    return triton.compile(
        GluonASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": registers},
    )


def compiled_attention(width, value):
    """Causal, in bfloat16."""
    d_1, d_2 = gluon_attention.split_width(width)
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
    types = {"q_1": descriptor(64, d_1), "q_2": descriptor(64, d_2 or d_1)}
    types |= {"k_1": descriptor(128, d_1), "k_2": descriptor(128, d_2 or d_1), "v": descriptor(128, value)}
    return compiled(gluon_attention._forward, constants, types, gluon_attention.ENTRY_REGISTERS)


def tool(built, option, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def test_attention_keeps_its_products_in_flight_and_its_weights_in_registers(tmp_path):
    built = compiled_attention(192, 128)
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


@pytest.mark.parametrize("rows", gluon_mla.FORMS)
def test_mla_decode_multiplies_pages_as_tall_operands_and_keeps_products_in_flight(rows, tmp_path):
    ring, registers = gluon_mla.FORMS[rows]
    constants = {"ROWS": rows, "RING": ring, "REGISTERS": registers, "LEAST": 2, "MANY": 256}
    built = compiled(gluon_mla._decode, constants, {"cache": descriptor(64, 64)}, gluon_mla.ENTRY_REGISTERS)
    used = dict(re.findall(r"(STACK|LOCAL):(\d+)", tool(built, "-res-usage", tmp_path)))
    assert used == {"STACK": "0", "LOCAL": "0"}
    assert built.metadata.shared <= 227 * 1024
    text = tool(built, "-sass", tmp_path)
    assert text.count("UTMALDG") == 9
    assert text.count(f"HGMMA.64x{rows}x16") == (9 + 8) * 4  # in steps of 16 dims, or tokens
    assert text.count("WARPGROUP.DEPBAR") == 2  # one for scores, one for outputs: nothing waits in between
