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

from benthic.kernels import gluon_attention, gluon_attention_backward

POINTERS = {
    "out_ptr": "*bf16",
    "dq_ptr": "*bf16",
    "dk_ptr": "*bf16",
    "dv_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "starts_q_ptr": "*i32",
    "starts_k_ptr": "*i32",
    "scale": "fp32",
}


HEADS = [(192, 128), (128, 128), (64, 64)]


def descriptor(rows, columns):
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"


def built(kernel, constants, descriptors, module):
    """A causal kernel in bfloat16 as a launch would compile it."""
    constants = constants | {
        "GROUPS": 1,
        "CAUSAL": True,
        "STAGES": module.STAGES,
        "REGISTERS": module.CONSUMER_REGISTERS,
        "FEW_REGISTERS": module.PRODUCER_REGISTERS,
    }
    types, names = POINTERS | descriptors, kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    fixed = {(names.index(name),): constant for name, constant in constants.items()}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in POINTERS}
    aligned.pop((names.index("scale"),))
    return triton.compile(
        GluonASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": module.ENTRY_REGISTERS},
    )


def forward(width, value):
    d_1, d_2 = gluon_attention.split_width(width)
    sizes = {"BLOCK_M": gluon_attention.QUERIES, "BLOCK_N": gluon_attention.KEYS}
    described = {"q_1": descriptor(64, d_1), "q_2": descriptor(64, d_2 or d_1)}
    described |= {
        "k_1": descriptor(128, d_1),
        "k_2": descriptor(128, d_2 or d_1),
        "v": descriptor(128, value),
    }
    heads = {"HEADS": 16, "D_1": d_1, "D_2": d_2, "V": value}
    return built(gluon_attention._forward, heads | sizes, described, gluon_attention)


def backward(kernel, width, value):
    d_1, d_2 = gluon_attention.split_width(width)
    tile, block = gluon_attention_backward.TILE, gluon_attention_backward.BLOCK
    of_keys = kernel == "key_gradients"
    constants = {"KEY_HEADS" if of_keys else "HEADS": 16, "D_1": d_1, "D_2": d_2, "V": value}
    constants |= {"BLOCK_M": block if of_keys else tile, "BLOCK_N": tile if of_keys else block}
    described = {name: descriptor(block, d_1) for name in ("q_1", "k_1")}
    described |= {name: descriptor(block, d_2 or d_1) for name in ("q_2", "k_2")}
    described |= {name: descriptor(block, value) for name in ("dout", "v")}
    module = gluon_attention_backward
    return built(getattr(module, kernel), constants, described, module)


def tool(kernel, option, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def assert_fits(kernel, folder):
    used = dict(re.findall(r"(STACK|LOCAL):(\d+)", tool(kernel, "-res-usage", folder)))
    assert used == {"STACK": "0", "LOCAL": "0"}
    assert kernel.metadata.shared <= 227 * 1024


def test_attention_keeps_its_products_in_flight_and_its_weights_in_registers(tmp_path):
    kernel = forward(192, 128)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
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


SHORT_OF_REGISTERS = pytest.mark.xfail(
    not triton.__version__.startswith("3.6"), reason="CUDA 13's assembler wants a few registers more than 240"
)


@pytest.mark.parametrize(
    ("name", "dims"),
    [("query_gradient", dims) for dims in HEADS]
    + [pytest.param("key_gradients", HEADS[0], marks=SHORT_OF_REGISTERS)]
    + [("key_gradients", dims) for dims in HEADS[1:]],
    ids=str,
)
def test_gradients_of_attention_keep_their_products_in_flight(name, dims, tmp_path):
    kernel = backward(name, *dims)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert "UTMALDG" in text
    assert "USETMAXREG.TRY_ALLOC" in text
    products = re.findall(r"HGMMA.*", text)
    # Only the last product of a group is one to wait for: the assembler did not run them one by one.
    assert 0 < sum("gsb0" in product for product in products) < len(products) / 2
