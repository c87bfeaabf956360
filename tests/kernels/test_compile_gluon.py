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

from benthic.kernels import (
    gluon_attention,
    gluon_attention_backward,
    gluon_attention_forward,
    gluon_dozens,
    gluon_expert_gradient,
    gluon_fp8,
    gluon_fp8_retile,
    gluon_fp8_split,
    gluon_fp8_squares,
    gluon_fp8_swiglu,
    gluon_fp8_three,
    gluon_fp8_three_gradient,
    gluon_fp8_tiles,
    gluon_grouped,
    gluon_mla,
    gluon_mla_fp8,
    gluon_mla_wide,
    gluon_sums,
)

POINTERS = {
    "out_ptr": "*bf16",
    "dq_ptr": "*bf16",
    "dk_ptr": "*bf16",
    "dv_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "starts_q_ptr": "*i32",
    "starts_k_ptr": "*i32",
    "tiles_ptr": "*i32",
    "latent_ptr": "*bf16",
    "rope_ptr": "*bf16",
    "table_ptr": "*i32",
    "context_ptr": "*i32",
    "counter_ptr": "*i32",
    "part_ptr": "*fp32",
    "squares_ptr": "*fp32",
    "ends_ptr": "*i32",
    "x_scale_ptr": "*fp32",
    "dy_scale_ptr": "*fp32",
    "weight_scale_ptr": "*fp32",
    "in_scale_ptr": "*fp32",
    "row_values_ptr": "*fp8e4nv",
    "row_scale_ptr": "*fp32",
    "column_words_ptr": "*i32",
    "column_scale_ptr": "*fp32",
    "row_weight_ptr": "*fp32",
}

HEADS = [(192, 128), (128, 128), (64, 64)]


def descriptor(rows, columns, dtype="bf16", *before):
    kinds = {
        "i32": gl.int32,
        "fp32": gl.float32,
        "bf16": gl.bfloat16,
        "fp16": gl.float16,
        "fp8e4nv": gl.float8e4nv,
    }
    block = [*before, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, kinds[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


def built(kernel, constants, types, registers, warps=4):
    """A kernel as a launch with aligned pointers and strides would compile it; bfloat16 but for `types`."""
    types, names = POINTERS | types | {"scale": "fp32"}, kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    fixed = {(names.index(name),): constant for name, constant in constants.items()}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name in POINTERS or name.startswith("stride_") or name.endswith("_dim")
    }
    return triton.compile(
        GluonASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "maxnreg": registers},
    )


def attention(kernel, constants, types, module):
    """A kernel of attention, causal unless its constants say otherwise, of listed tiles likewise."""
    constants = {"CAUSAL": True, "LISTED": True} | constants
    constants |= {
        "GROUPS": 1,
        "TOGETHER": 16,
        "STAGES": module.STAGES,
        "REGISTERS": module.CONSUMER_REGISTERS,
        "FEW_REGISTERS": module.PRODUCER_REGISTERS,
    }
    return built(kernel, constants, types, module.ENTRY_REGISTERS)


def forward(width, value, dtype, *, causal, apart):
    d_1, d_2 = gluon_attention.split_width(width)
    sizes = {"BLOCK_M": gluon_attention.QUERIES, "BLOCK_N": gluon_attention.KEYS}
    blocks = {"q_1": (64, d_1), "q_2": (64, d_2 or d_1), "k_1": (128, d_1), "k_2": (128, d_2 or d_1)}
    blocks["v"] = (128, value)
    types = {"out_ptr": f"*{dtype}"} | {name: descriptor(*block, dtype) for name, block in blocks.items()}
    heads = {"HEADS": 16, "D_1": d_1, "D_2": d_2, "V": value, "CAUSAL": causal, "APART": apart}
    kernel = gluon_attention_forward.attention_forward
    return attention(kernel, heads | sizes, types, gluon_attention)


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
    return attention(getattr(module, kernel), constants, described, module)


def tool(kernel, option, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def assert_fits(kernel, folder):
    used = dict(re.findall(r"(STACK|LOCAL):(\d+)", tool(kernel, "-res-usage", folder)))
    assert used == {"STACK": "0", "LOCAL": "0"}
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize(
    ("dims", "dtype", "causal", "apart"),
    [
        ((192, 128), "bf16", True, False),
        ((192, 128), "bf16", True, True),
        ((128, 128), "bf16", True, False),
        ((64, 64), "fp16", False, False),
    ],
    ids=str,
)
def test_attention_keeps_its_products_in_flight_and_its_weights_in_registers(
    dims, dtype, causal, apart, tmp_path
):
    kernel = forward(*dims, dtype, causal=causal, apart=apart)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert "UTMALDG" in text
    assert "USETMAXREG.TRY_ALLOC" in text
    order = [
        "wait" + found.group(1) if found.group(1) else found.group(0)
        for found in re.finditer(r"MUFU\.EX2|DEPBAR\.LE gsb0, 0x([01])", text)
    ]
    loops = [at for at, what in enumerate(order) if what == "wait1"]
    assert len(loops) == 2 * 3  # of two groups: cut blocks, whole ones, the next tile's first
    assert set(re.findall(r"STG\S*", text)) == {"STG.E", "STG.E.128"}  # sums of rows, outputs
    for at in loops:  # powers between the wait for scores and the wait for the other product
        assert order[at + 1 : at + 65] == ["MUFU.EX2"] * 64
        assert "wait0" in order[at + 65 : at + 70]


@pytest.mark.parametrize(("dtype", "both"), [("bf16", True), ("fp16", True), ("bf16", False)])
@pytest.mark.parametrize("ends", [False, True])
def test_squares_convert_two_values_at_once_and_leave_room_for_other_programs(dtype, both, ends, tmp_path):
    module, types = gluon_fp8_squares, {"x": descriptor(128, 128, dtype)}
    constants = {"HAS_ENDS": ends, "BOTH": both, "POWER_OF_TWO": False}
    kernel = built(module._quantise_squares, constants, types, module.REGISTERS)
    assert_fits(kernel, tmp_path)
    assert module.PROGRAMS * (kernel.metadata.shared + 1024) <= 228 * 1024
    assert module.PROGRAMS * 128 * module.REGISTERS <= 65536
    text = tool(kernel, "-sass", tmp_path)
    assert "UTMALDG.2D" in text
    assert text.count("F2FP.SATFINITE.E4M3") == 64 * (1 + both)  # 128 values of a thread each way
    assert len(re.findall(r"STG\.E\.128 ", text)) == 8  # whole lines of columns


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_rows_turned_into_columns_are_read_and_multiplied_once(ends, power_of_two, tmp_path):
    module = gluon_fp8_retile
    types = {"x": descriptor(128, 128, "fp8e4nv"), "out": descriptor(16, 32, "i32", 8)}
    constants = {"HAS_ENDS": ends, "POWER_OF_TWO": power_of_two, "in_stride": 1}
    kernel = built(module._retile_squares, constants, types, module.REGISTERS, module.WARPS)
    assert_fits(kernel, tmp_path)
    assert module.PROGRAMS * (kernel.metadata.shared + 1024) <= 228 * 1024
    assert module.PROGRAMS * module.WARPS * 32 * module.REGISTERS <= 65536
    text, values = tool(kernel, "-sass", tmp_path), 128 * 128 // (32 * module.WARPS)
    assert text.count("F2FP.F16.E4M3") == text.count("F2FP.SATFINITE.E4M3") == values // 2
    # a product with the row's scale, and a quotient: one product, or three
    operations = len(re.findall(r"\b(?:FMUL|FFMA)\b", text))
    assert 0 <= operations - (2 if power_of_two else 4) * values < 32
    assert "PRMT" not in text  # conversions put words together, four at once are read
    # two squares ahead, then, square by square: read, the next asked for, turned round, left by TMA
    steps = re.findall(r"LDS\.64|UTMALDG|STS(?= )|UTMASTG", text)
    order = "".join({"LDS.64": "r", "UTMALDG": "L", "STS": "w", "UTMASTG": "S"}[step] for step in steps)
    assert order == "LL" + "r" * (values // 8) + "L" + "w" * (values // 4) + "S"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_squares_of_swiglu_leave_room_for_another_program_and_are_asked_for_one_by_one(
    dtype, ends, power_of_two, weighted, tmp_path
):
    module, types = gluon_fp8_swiglu, {name: descriptor(128, 128, dtype) for name in ("gate_up", "dy")}
    constants = {"HAS_ENDS": ends, "POWER_OF_TWO": power_of_two, "WEIGHTED": weighted}
    constants |= {} if weighted else {"row_weight_ptr": None, "part_ptr": None}
    kernel = built(module._swiglu_squares, constants, types, module.REGISTERS, module.WARPS)
    assert_fits(kernel, tmp_path)
    assert module.PROGRAMS * (kernel.metadata.shared + 1024) <= 228 * 1024
    assert module.PROGRAMS * module.WARPS * 32 * module.REGISTERS <= 65536
    text = tool(kernel, "-sass", tmp_path)
    assert text.count("F2FP.SATFINITE.E4M3") == 2 * 64  # two squares, 64 values of a thread each way
    assert text.count("MUFU.EX2") - 64 == (3 if power_of_two else 0)  # scales of a row and of two columns
    assert text.count("BAR.SYNC") <= 35  # 12 of which are for squares that no expert fills
    steps = re.findall(r"UTMALDG|FENCE\.VIEW\.ASYNC|STG\.E\.128 ", text)
    order = "".join({"U": "L", "F": "f", "S": "s"}[step[0]] for step in steps)
    # what was written is visible to TMA before a square is overwritten, and dy's is the last of all
    assert re.fullmatch(r"f+LLLf+Lssssf+Lssssf*L", order)


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
def test_gradients_of_attention_keep_their_products_in_flight_and_leave_in_whole_sectors(
    name, dims, tmp_path
):
    kernel = backward(name, *dims)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert "UTMALDG" in text
    assert "USETMAXREG.TRY_ALLOC" in text
    products = re.findall(r"HGMMA.*", text)
    # Only the last product of a group is one to wait for: the assembler did not run them one by one.
    assert 0 < sum("gsb0" in product for product in products) < len(products) / 2
    assert set(re.findall(r"STG\S*", text)) == {"STG.E.128"}
    order = "".join(
        found.group(1) or "e" for found in re.finditer(r"MUFU\.EX2|DEPBAR\.LE gsb0, 0x(\d)", text)
    )
    if name == "key_gradients" and dims[0] != 192:  # the gradient of keys is in flight beside powers
        assert order.count("1" + "e" * 32 + "10") == 2 * 2


def assert_starts_soon(text):
    """Nothing is read before the kernel ahead has ended, what needs no input is made before, and contexts are
    added up without a barrier: the only one starts the groups.
    """
    before, after = text.split("ACQBULK")
    started = before.rindex("USETMAXREG")
    assert "UTMALDG" in before[started:]
    assert not re.findall(r"\bLDG\b|\bSTG\b", before[started:])
    assert after[: after.index("USETMAXREG")].count("BAR.SYNC") == 1


@pytest.mark.parametrize("rows", gluon_mla.FORMS)
def test_mla_decode_multiplies_pages_as_tall_operands_and_keeps_products_in_flight(rows, tmp_path):
    constants = {"ROWS": rows, **gluon_mla.FORMS[rows], "LEAST": 2, "MANY": 256, "PDL": True}
    described = {"cache": descriptor(64, 64), "few": descriptor(16, 64)}
    kernel = built(gluon_mla._decode, constants, described, gluon_mla.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert_starts_soon(text)
    assert text.count("UTMALDG") == 1 + 9 + 9 * 4  # to wake TMA, a page, a page in boxes of 16 tokens
    assert text.count(f"HGMMA.64x{rows}x16") == (9 + 8) * 4  # in steps of 16 dims, or tokens
    assert text.count("WARPGROUP.DEPBAR") == 2  # one for scores, one for outputs: nothing waits in between


@pytest.mark.parametrize("rows", gluon_mla_fp8.FORMS)
def test_mla_decode_widens_an_fp8_cache_two_numbers_at_a_time(rows, tmp_path):
    constants = {"ROWS": rows, **gluon_mla_fp8.FORMS[rows], "LEAST": 2, "MANY": 256, "PDL": True}
    described = {"cache": descriptor(64, 64, "fp8e4nv")}
    kernel = built(gluon_mla_fp8._decode, constants, described, gluon_mla_fp8.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert_starts_soon(text)
    assert text.count("UTMALDG") == 1 + 9
    assert text.count("HMUL2.BF16_V2") == 64 * 576 // 128 // 2
    # Loads, then stores of what they gave, a fence, and only then a place is given back to TMA.
    steps = re.findall(r"ld\.shared\.v4|st\.shared\.v4|fence\.proxy|mbarrier\.arrive\.s", kernel.asm["ptx"])
    order = "".join({"l": "l", "s": "s", "f": "F", "m": "A"}[step[0]] for step in steps)
    assert order.count(("l" * 6 + "s" * 12 + "FA") * 3 + "A") == 1
    assert text.count(f"HGMMA.64x{rows}x16") == (9 + 8) * 4
    assert text.count("WARPGROUP.DEPBAR") == 2


@pytest.mark.parametrize("heads", [64, 128])
def test_mla_decode_of_many_rows_sums_values_while_scores_are_computed(heads, tmp_path):
    registers = {
        "REGISTERS": gluon_mla_wide.VALUE_REGISTERS,
        "FEW_REGISTERS": gluon_mla_wide.PRODUCER_REGISTERS,
    }
    constants = registers | {"LEAST": 2, "MANY": 256} | ({"tiles": 1} if heads == 64 else {})
    described = {"latents": descriptor(64, 128), "ropes": descriptor(64, 64)}
    kernel = built(gluon_mla_wide._decode, constants, described, gluon_mla_wide.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert text.count("UTMALDG") == 9  # boxes of 64 dims
    assert text.count("HGMMA.64x64x16") == 9 * 4
    assert text.count("HGMMA.64x128x16") == 2 * 2 * 4  # two groups, two pieces each
    assert text.count("WARPGROUP.DEPBAR") == 1 + 2 * 2  # scores of a page, a piece of each group's values
    assert "LDSM" in text  # weights are the left operand, from registers


OF_64, OF_128 = descriptor(64, 128, "fp8e4nv"), descriptor(128, 128, "fp8e4nv")


@pytest.mark.parametrize(
    ("tail", "ends"),
    [(False, True), (False, False), (True, True)],
    ids=["experts", "one weight", "one whose tail is divided"],
)
@pytest.mark.parametrize(("dtype", "out"), [("bf16", gl.bfloat16), ("fp32", gl.float32)])
def test_fp8_products_promote_one_part_while_the_next_is_multiplied(dtype, out, tail, ends, tmp_path):
    layout = gl.NVMMASharedLayout.get_default_for([64, 128], out)
    constants = {"OUT_LAYOUT": layout, "TOGETHER": 8, "TAIL": tail}
    constants |= {} if ends else {"ends_ptr": None}
    constants |= {"REGISTERS": gluon_fp8.CONSUMER_REGISTERS, "FEW_REGISTERS": gluon_fp8.PRODUCER_REGISTERS}
    types = {"x": OF_64, "wide": OF_128, "narrow": OF_64, "out_ptr": f"*{dtype}"}
    kernel = built(gluon_fp8._rows_times_blocks, constants, types, gluon_fp8.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    order = re.findall(r"QGMMA\.64x\d+x32|DEPBAR\.LE gsb0, 0x[01]|FFMA R", text)
    assert order.count("QGMMA.64x128x32") == order.count("QGMMA.64x64x32") == 2 * 4
    assert order.count("FFMA R") == 2 * 96
    one_more = [at for at, what in enumerate(order) if what.endswith("0x1")]
    assert len(one_more) == 2
    for at in one_more:  # something is promoted before everything is waited for
        assert "FFMA R" in order[at : order.index("DEPBAR.LE gsb0, 0x0", at)]
    assert text.count("STG.E.128") == 2 * 12 * (2 if dtype == "fp32" else 1)
    assert text.count("STG.E.64") == text.count("LDG.E.64") == (2 * 48 if tail else 0)  # sums handed over
    assert text.count("LDG.E.STRONG.GPU") == (2 * 2 if tail else 0)


def scales(count):
    """A line of float32 scales."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return f"tensordesc<fp32[{count}],{layout!r}>"


THREE_GROUPS = {
    "REGISTERS": gluon_fp8_tiles.TALL_REGISTERS,
    "FEW_REGISTERS": gluon_fp8_tiles.PRODUCER_REGISTERS,
}


def assert_wide(text, *, squares=False):
    """Products of three groups, each with 64 rows and all columns of a chunk, and their promotion."""
    assert text.count("QGMMA.64x128x32") == 3 * 4  # four times 32 of a chunk
    assert text.count("FFMA R") == 3 * 64 or squares


@pytest.mark.parametrize("ends", [True, False], ids=["experts", "one weight"])
def test_fp8_products_of_three_groups_are_wide_and_leave_by_tma(ends, tmp_path):
    types = {"x": OF_64, "weight": OF_128, "out": descriptor(64, 128)}
    constants = THREE_GROUPS | ({} if ends else {"ends_ptr": None, "counter_ptr": None})
    kernel = gluon_fp8_three._rows_times_blocks
    kernel = built(kernel, constants, types, gluon_fp8_tiles.TALL_ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert_wide(text)
    assert text.count("UTMASTG") == 3


@pytest.mark.parametrize(
    ("out", "add", "fetch", "squares", "ends"),
    [
        ("fp32", True, True, False, True),
        ("fp32", True, False, False, True),
        ("fp32", True, False, False, False),
        ("fp32", False, False, False, True),
        ("fp32", False, False, True, True),
        ("fp32", False, False, True, False),
        ("bf16", False, False, False, True),
    ],
    ids=str,
)
def test_fp8_weight_gradients_are_wide_and_leave_by_tma_while_the_next_tile_is_multiplied(
    out, add, fetch, squares, ends, tmp_path
):
    module = gluon_fp8_three_gradient
    expert, rows, columns = gluon_sums.box(turned=False)
    types = {"dy": OF_64, "x": OF_128, "dy_scale": scales(64), "x_scale": scales(128)}
    types |= {"out": descriptor(rows, columns, out, expert), "out_ptr": f"*{out}"}
    constants = {"ADD": add, "FETCH": fetch, "SQUARES": squares} | THREE_GROUPS
    constants |= {} if squares else {"squares_ptr": None}
    constants |= {} if ends else {"ends_ptr": None}
    kernel = built(module._column_tiles, constants, types, gluon_fp8_tiles.TALL_ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    assert_wide(text, squares=squares)
    leaves = "UTMAREDG.3D.ADD" if add else "UTMASTG.3D"
    order = re.findall(r"QGMMA|DEPBAR\.LE gsb0|UTMA(?:REDG|STG)\S*|DEPBAR\.LE SB0, 0x\d", text)
    part = [f"DEPBAR.LE SB0, 0x{module.SLOTS.value - 1}", leaves]  # only shared memory of parts before is met
    group = ["QGMMA"] * 4 + ["DEPBAR.LE gsb0"] + part * 4
    assert [what for what in order if not what.endswith("0x0")] == group * 3
    assert order[-1].endswith("0x0")  # behind the last tile; groups may share it
    assert ("UBLKPF.L2" in text) == fetch  # old sums
    assert len(re.findall(r"\b(?:REDG|STG)\.E", text)) == (3 if squares else 0)


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("rows", [64, 128])
def test_shares_of_an_fp8_product_load_weights_before_they_wait_for_rows(rows, groups, early, tmp_path):
    module = gluon_fp8_split
    constants = {"ROWS": rows, "GROUPS": groups, "STAGES": module.stages(rows, groups), "PDL": early}
    constants |= {"REGISTERS": module.TALL_REGISTERS, "FEW_REGISTERS": module.PRODUCER_REGISTERS}
    types = {"x": descriptor(rows, 128, "fp8e4nv"), "weight": OF_64, "out": descriptor(rows, 64)}
    kernel = built(module._shares, constants, types, module.TALL_ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    assert constants["STAGES"] >= 4
    text = tool(kernel, "-sass", tmp_path)
    assert text.count("QGMMA.64x64x32") == groups * rows // 64 * 4
    assert text.count("UTMASTG") == groups
    assert text.count("STG.E.64") == groups * rows // 4  # sums of 64 columns, two at a time
    order = re.findall(r"UTMALDG|ACQBULK", text)
    assert order.count("UTMALDG") == 2 * groups + 1
    assert order.count("ACQBULK") == (groups + 1 if early else 0)
    if early:
        loads = "".join("w" if what == "UTMALDG" else "|" for what in order)
        assert re.search(f"w{{{groups}}}\\|w{{{groups + 1}}}", loads)


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize(
    ("out", "dtype", "add", "fetch", "squares"),
    [
        ("fp32", "bf16", True, True, False),
        ("fp32", "bf16", False, False, True),
        ("fp32", "fp16", True, False, False),
        ("bf16", "bf16", False, False, False),
    ],
    ids=str,
)
def test_weight_gradients_of_experts_have_a_product_in_flight_and_leave_or_are_added_by_tma(
    out, dtype, add, fetch, squares, turned, tmp_path
):
    module = gluon_expert_gradient
    constants = {"ADD": add, "FETCH": fetch, "TURNED": turned, "SQUARES": squares}
    constants |= {} if squares else {"squares_ptr": None}
    constants |= {"REGISTERS": module.CONSUMER_REGISTERS, "FEW_REGISTERS": module.PRODUCER_REGISTERS}
    expert, rows, columns = gluon_sums.box(turned)
    described = {"left": descriptor(64, 64, dtype), "right": descriptor(64, 256, dtype)}
    described |= {"out": descriptor(rows, columns, out, expert), "out_ptr": f"*{out}"}
    kernel = built(module._expert_gradient, constants, described, module.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    products = re.findall(r"HGMMA\.64x256x16.*", text)
    assert len(products) == 2 * 4  # two groups, four times 16 rows
    assert all(".tnspA.tnspB" in product for product in products)
    assert sum("gsb0" in product for product in products) == 2
    assert re.findall(r"DEPBAR\.LE gsb0, 0x([01])", text) == ["1", "0"] * 2
    parts = 2 * 8  # of 32 columns
    assert (text.count("UTMAREDG.3D.ADD"), text.count("UTMASTG.3D")) == ((parts, 0) if add else (0, parts))
    assert ("UBLKPF.L2" in text) == fetch  # old sums
    assert len(re.findall(r"\b(?:REDG|STG)\.E", text)) == (2 if squares else 0)


@pytest.mark.parametrize(
    ("turned", "gated", "ends"),
    [(True, False, True), (False, False, True), (True, True, True), (True, True, False)],
    ids=["output", "input gradient", "output with SwiGLU", "of one weight"],
)
def test_products_of_experts_have_one_in_flight_and_leave_by_tma(turned, gated, ends, tmp_path):
    described = {"x": descriptor(64, 64), "weight": descriptor(64, 64)}
    described["out"] = descriptor(64, 64 if gated else 128)
    constants = {"TURNED": turned, "GATED": gated, "REGISTERS": gluon_grouped.CONSUMER_REGISTERS}
    constants["FEW_REGISTERS"] = gluon_grouped.PRODUCER_REGISTERS
    constants |= {} if ends else {"ends_ptr": None}
    kernel = gluon_grouped._rows_times_experts
    kernel = built(kernel, constants, described, gluon_grouped.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    products = re.findall(r"HGMMA\.64x128x16.*", text)
    assert len(products) == 2 * (2 + 1) * 4  # groups; both halves of their rows, or one; 16 dims of a chunk
    assert all((".tnspB" in product) != turned for product in products)
    assert sum("gsb0" in product for product in products) == 2 * 2
    assert re.findall(r"DEPBAR\.LE gsb0, 0x(\d)", text) == ["1", "0"] * 2 * 2
    assert text.count("UTMALDG") == 4 + 2  # halves of rows and of columns
    assert "UTMASTG" in text
    assert text.count("MUFU.EX2") == (2 * (2 + 1) * 32 if gated else 0)  # 64 x 64 over 128 threads


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "swiglu"])
def test_products_of_dozens_of_rows_are_waited_for_once_a_chunk_and_have_their_first_weights_ahead(
    gated, early, tmp_path
):
    module, own, count = gluon_dozens, 64 if gated else 128, gluon_dozens.TOGETHER
    rows, box = module.ROWS.value, module.BOX.value
    types = {"x": descriptor(box, 64), "weight": descriptor(64, 64)}
    out = gl.NVMMASharedLayout.get_default_for([rows, own], gl.bfloat16)
    constants = {"GATED": gated, "COUNT": count, "OUT_LAYOUT": out, "PDL": early}
    constants |= {"REGISTERS": module.CONSUMER_REGISTERS, "FEW_REGISTERS": module.PRODUCER_REGISTERS}
    kernel = built(module._experts_times_rows, constants, types, module.ENTRY_REGISTERS)
    assert_fits(kernel, tmp_path)
    text = tool(kernel, "-sass", tmp_path)
    products = re.findall(r"HGMMA\S*", text)
    # two groups have 128 of the weight's rows each, four times 16 dims of a chunk
    assert products == [f"HGMMA.64x{rows}x16.F32.BF16"] * (2 * 2 * 4)
    assert sum("gsb0" in product for product in re.findall(r"HGMMA.*", text)) == 2  # the last of a chunk
    assert text.count("MUFU.EX2") == (2 * 64 * rows // 128 if gated else 0)
    assert text.count("STSM.16.MT88.4") == 2 * own * rows // 1024  # sums are turned round
    assert set(re.findall(r"STG\S*", text)) == {"STG.E.128"}  # and leave in whole sectors
    ahead = ["UTMALDG"] * (4 * module.STAGES.value) + ["ACQBULK"] if early else []
    loads = ["UTMALDG"] * (count * (4 + rows // box))
    order = re.findall(r"UTMALDG|ACQBULK", text)
    assert order in (ahead + loads, loads + ahead)  # the assembler puts either part first
