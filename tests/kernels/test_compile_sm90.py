"""Every Triton kernel compiles for Hopper without a GPU; products use wgmma and nothing spills registers."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOATS = {
    "whole",
    "beta2",
    "correction",
    "decay",
    "eps",
    "fresh1",
    "fresh2",
    "scale",
    "sign",
    "step_size",
}
INT64 = {"target_ptr", "row_ptr", "copy_ptr", "slot_ptr", "from_ptr", "to_ptr"}
INT32 = {"ends_ptr", "table_ptr", "sequence_ptr", "context_ptr", "starts_q_ptr", "starts_k_ptr"}
FLOAT32 = {
    "gradient_ptr",
    "master_ptr",
    "rstd_ptr",
    "dweight_ptr",
    "lse_ptr",
    "delta_ptr",
    "cos_ptr",
    "sin_ptr",
    "scale_ptr",
    "part_ptr",
    "in_scale_ptr",
    "row_scale_ptr",
    "column_scale_ptr",
    "x_scale_ptr",
    "dy_scale_ptr",
    "weight_scale_ptr",
}


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


def kernel_of(module, kernel):
    return getattr(importlib.import_module(f"benthic.kernels.{module}"), kernel)


def compiled(module, kernel, constants, *, dtype="bf16", warps=4, stages=3, overrides=None):
    """Compile as a launch with 16-byte aligned pointers and strides would; returns (ptx, resource usage)."""
    function = kernel_of(module, kernel)
    names = function.arg_names
    if "PDL" in names:
        constants = {"PDL": False} | constants
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = argument_type(name, dtype, overrides or {})
        if (
            name.endswith(("_ptr", "_dim"))
            or "stride" in name
            or name in ("width", "half", "columns", "inner", "words")
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, constexprs, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )


def resources(built, tmp_path):
    """Registers, bytes spilled to the stack and instructions of a compiled kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return SimpleNamespace(
        registers=numbers["REG"],
        spilled=numbers["STACK"] + numbers["LOCAL"],
        shared=built.metadata.shared,
        wgmma=built.asm["ptx"].count("wgmma.mma_async"),
    )


def assert_fits(used):
    assert used.registers <= 255
    assert used.spilled == 0
    assert used.shared <= 227 * 1024


HEADS = [(192, 128), (128, 128), (64, 64)]


def head_constants(d, v, block_m, block_n, *, causal=True):
    attention = importlib.import_module("benthic.kernels.triton_attention")
    d_1, d_2 = attention.split_width(d)
    widths = {"D": d, "D_1": d_1, "D_2": d_2, "V": v, "V_PAD": attention.pad_value(v)}
    return {
        **widths,
        "GROUPS": 1,
        "CAUSAL": causal,
        "PRECISION": "ieee",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("d", "v"), HEADS)
def test_attention_forward_uses_wgmma_without_spills(d, v, dtype, tmp_path):
    attention = importlib.import_module("benthic.kernels.triton_attention")
    block_m, block_n, warps, stages = attention.forward_tiles(torch.bfloat16, d)
    constants = {**head_constants(d, v, block_m, block_n), "HEADS": 16}
    built = compiled("triton_attention", "_forward", constants, dtype=dtype, warps=warps, stages=stages)
    used = resources(built, tmp_path)
    assert_fits(used)
    assert used.wgmma > 0


@pytest.mark.parametrize(("d", "v"), HEADS)
@pytest.mark.parametrize("kernel", ["_keys_and_values", "_query_gradient"])
def test_attention_backward_uses_wgmma_without_spills(kernel, d, v, tmp_path):
    backward = importlib.import_module("benthic.kernels.triton_attention_backward")
    of_keys = kernel == "_keys_and_values"
    tiles = (backward.key_tiles if of_keys else backward.query_tiles)(torch.bfloat16, d)
    block_m, block_n, warps, stages = tiles
    constants = head_constants(d, v, block_m, block_n) | {"KEY_HEADS" if of_keys else "HEADS": 16}
    used = resources(
        compiled("triton_attention_backward", kernel, constants, warps=warps, stages=stages), tmp_path
    )
    assert_fits(used)
    assert used.wgmma > 0


@pytest.mark.parametrize("cache", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("rows", [16, 32, 128])
def test_mla_decode_does_not_spill_and_uses_wgmma_from_64_rows(rows, cache, tmp_path):
    block_h, block_n, warps, stages = importlib.import_module("benthic.kernels.triton_mla").tiles(
        torch.bfloat16, rows, fp8_cache=cache == "fp8e4nv"
    )
    constants = {
        "C": 512,
        "C_PAD": 512,
        "R": 64,
        "R_PAD": 64,
        "PAGE": 64,
        "BLOCK_H": block_h,
        "BLOCK_N": block_n,
        "PRECISION": "ieee",
    }
    built = compiled(
        "triton_mla",
        "_decode",
        constants,
        warps=warps,
        stages=stages,
        overrides={"out_ptr": "*fp32", "cache_ptr": f"*{cache}"},
    )
    used = resources(built, tmp_path)
    assert_fits(used)
    assert (used.wgmma > 0) == (block_h >= 64)


PLAIN_PRODUCT = {"PRECISION": "tf32", "GATED": False}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [0, 6, 12, 24])
def test_the_product_of_few_rows_uses_wgmma_without_spills(rows, fp8, tmp_path):
    module = importlib.import_module("benthic.kernels.triton_few_rows")
    block_r, block_k, stages = module.tiles(torch.float8_e4m3fn if fp8 else torch.bfloat16, rows)
    constants = {"BLOCK_R": block_r, "BLOCK_N": module.COLUMNS, "BLOCK_K": block_k, "WHOLE": True}
    constants["EXPERTS"] = 0 if rows else 64  # fewer rows than experts
    constants |= {"GROUPED": True, "EMULATE": False, "STAGES": stages} if fp8 else PLAIN_PRODUCT
    kinds = dict.fromkeys(("x_ptr", "weight_ptr"), "*fp8e4nv") if fp8 else {}
    kernel = "_few_rows_of_blocks" if fp8 else "_few_rows"
    built = compiled("triton_few_rows", kernel, constants, warps=4, stages=stages, overrides=kinds)
    used = resources(built, tmp_path)
    assert_fits(used)
    assert used.wgmma > 0
    if fp8:  # scales too are loaded ahead, four bytes at a time
        assert re.search(r"cp\.async\.ca\.shared\.global \[.*, 0x4", built.asm["ptx"])


def programs_of(used):
    """Programs of four warps that a multiprocessor has room for."""
    return min(65536 // (128 * used.registers), 227 * 1024 // (used.shared + 1024))


def words_shared(built, way):
    """Words of 32 bits that a thread stores in shared memory (`st`) or loads from it (`ld`)."""
    found = re.findall(rf"\b{way}\.shared\S*?(?:\.v(\d))?\.b32", built.asm["ptx"])
    return sum(int(words or 1) for words in found)


@pytest.mark.parametrize("rows", [0, 6, 12, 24])
def test_swiglu_costs_the_product_of_few_rows_neither_loads_nor_room_on_a_multiprocessor(rows, tmp_path):
    """A tile is as large, and sums meet where a plain product's are put in order to be written."""
    module = importlib.import_module("benthic.kernels.triton_few_rows")
    block_r, block_k, stages = module.tiles(torch.bfloat16, rows)
    constants = {"BLOCK_R": block_r, "BLOCK_N": module.COLUMNS, "BLOCK_K": block_k, "WHOLE": True}
    constants |= PLAIN_PRODUCT | {"EXPERTS": 0 if rows else 64}
    plain, gated = (
        compiled("triton_few_rows", "_few_rows", constants | {"GATED": way}, stages=stages)
        for way in (False, True)
    )
    used, before = resources(gated, tmp_path), resources(plain, tmp_path)
    assert_fits(used)
    assert used.shared == before.shared
    assert programs_of(used) == programs_of(before) == 2
    for words in ("wgmma.mma_async", "cp.async.cg", "bar.sync"):
        assert gated.asm["ptx"].count(words) == plain.asm["ptx"].count(words) > 0, words
    for way in ("st", "ld"):
        assert words_shared(gated, way) == words_shared(plain, way) > 0


@pytest.mark.parametrize(("tiling", "kind"), [(1, "heads"), (4, "searched")])
def test_a_product_by_row_is_one_kind_of_instruction_for_few_rows_and_many_without_spills(
    tiling, kind, tmp_path
):
    module = importlib.import_module("benthic.kernels.triton_by_row")
    block_r, block_n, block_k, warps, stages = module.TILINGS[tiling]
    constants = {
        "BLOCK_R": block_r,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "WHOLE": True,
        "PRECISION": "tf32",
    }
    constants |= {"SORTED": kind != "heads", "SEARCH": kind == "searched", "GROUPS": 128}
    constants["stride_n" if kind == "heads" else "stride_k"] = 1
    built = compiled("triton_by_row", "_product", constants, warps=warps, stages=stages)
    used = resources(built, tmp_path)
    assert_fits(used)
    kinds = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)\.f32", built.asm["ptx"])
    assert kinds == [f"m64n{block_r}k16"] * (block_k // 16 * (block_n // (16 * warps)))


@pytest.mark.parametrize("cache", ["bf16", "fp8e4nv"])
def test_attention_by_row_does_not_spill(cache, tmp_path):
    module = importlib.import_module("benthic.kernels.triton_mla_by_row")
    block_h, block_n, warps, stages = module.tiles(torch.bfloat16, fp8_cache=cache == "fp8e4nv")
    constants = {"C": 512, "C_PAD": 512, "R": 64, "R_PAD": 64, "PAGE": 64, "PRECISION": "ieee"}
    constants |= {"BLOCK_H": block_h, "BLOCK_N": block_n}
    kinds = {"cache_ptr": f"*{cache}"}
    built = compiled("triton_mla_by_row", "_attend", constants, warps=warps, stages=stages, overrides=kinds)
    assert_fits(resources(built, tmp_path))


@pytest.mark.parametrize(
    "direction", ["forward", "input gradient", "weight gradient", "added weight gradient"]
)
def test_the_experts_product_uses_wgmma_without_spills(direction, tmp_path):
    tiles = importlib.import_module("benthic.kernels.triton_moe").tiles
    block_m, block_n, block_k, warps, stages = tiles(torch.bfloat16, 512)
    added = direction == "added weight gradient"
    if direction.endswith("weight gradient"):
        constants = {"BLOCK_O": block_m, "BLOCK_I": block_n, "BLOCK_R": block_k, "PRECISION": "ieee"}
        constants["ADD"] = added
        kernel = "_expert_gradient"
    else:
        constants = {
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "EXPERTS": 128,
            "PRECISION": "ieee",
            ("stride_k" if direction == "forward" else "stride_n"): 1,
        }
        kernel = "_rows_times_experts"
    built = compiled(
        "triton_moe",
        kernel,
        constants,
        warps=warps,
        stages=stages,
        overrides={"dweight_ptr": "*fp32" if added else "*bf16"},
    )
    used = resources(built, tmp_path)
    assert_fits(used)
    assert used.wgmma > 0


@pytest.mark.parametrize("experts", [0, 64])
@pytest.mark.parametrize(
    ("direction", "rows"),
    [
        ("rows times blocks", 16),
        ("rows times blocks", 64),
        ("rows times blocks", 512),
        ("column tiles", 64),
        ("column tiles, added", 64),
    ],
)
def test_fp8_products_use_wgmma_without_spills(direction, rows, experts, tmp_path):
    block_m, block_n, warps, stages = importlib.import_module("benthic.kernels.triton_fp8_linear").tiles(rows)
    constants = {"EXPERTS": experts, "EMULATE": False}
    if rows == 512:
        constants |= {"experts": 1, "k_tiles": 1}
    if direction == "rows times blocks":
        constants["x_scale_stride"] = 1
    if direction.startswith("column tiles"):
        constants["ADD"] = direction.endswith("added")
        constants |= {"BLOCK_O": block_m, "BLOCK_I": block_n, "BLOCK_P": 128}
        kernel = "_column_tiles"
    else:
        constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128}
        kernel = "_rows_times_blocks"
    overrides = dict.fromkeys(("x_ptr", "weight_ptr", "dy_ptr"), "*fp8e4nv")
    built = compiled("triton_fp8_linear", kernel, constants, warps=warps, stages=stages, overrides=overrides)
    used = resources(built, tmp_path)
    assert_fits(used)
    assert (used.wgmma > 0) == (block_m >= 64)


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
def test_shares_of_an_fp8_product_are_added_sixteen_bytes_at_a_time(early, tmp_path):
    split = importlib.import_module("benthic.kernels.gluon_fp8_split")
    constants = {"ROWS": 128, "GROUPS": 2, "PART": 64, "SLICE": split.SLICE, "PDL": early}
    built = compiled("gluon_fp8_split", "_add_shares", constants)
    used = resources(built, tmp_path)
    assert_fits(used)
    assert used.registers <= 40  # so that some programs fit beside one of the product
    assert used.shared == 0
    assert built.asm["ptx"].count("ld.global.v4.b32") == 8


GATE = dict.fromkeys(("logits_ptr", "bias_ptr", "scores_ptr", "weight_ptr"), "*fp32")
GATE |= dict.fromkeys(("dscores_ptr", "dweight_ptr", "dlogits_ptr"), "*fp32")
GATE["expert_ptr"] = "*i32"
GATED = {"out_ptr": "*fp32"}
ROUTES = {"expert_ptr": "*i32", "side_ptr": "*fp32", "count_ptr": "*i64", "token_ptr": "*i64"}
ROUTES |= {"goes_ptr": "*u8", "found_ptr": "*i32"}
PAGES, TENSORS = dict.fromkeys(("cache_ptr", "slot_ptr")), dict.fromkeys(("key_out_ptr", "latent_out_ptr"))
E4M3 = {"cache_ptr": "*fp8e4nv"}
STORED = [(PAGES, {}), ({}, {}), (TENSORS, {}), ({}, E4M3), (TENSORS, E4M3)]
"""What `_rotate_and_norm` writes: arguments that are None, and types of the cache."""
BALANCE = {"factor": "fp32", "expert_ptr": "*i32", "count_ptr": "*i64"} | dict.fromkeys(
    ("scores_ptr", "loads_ptr", "weighted_ptr", "found_ptr", "dloss_ptr", "dscores_ptr"), "*fp32"
)

BEST = dict.fromkeys(("token", "fed", "home", "newest", "row", "owner", "line"), "*i64")
BEST = {f"{name}_ptr": kind for name, kind in BEST.items()} | {"best_ptr": "*fp32", "first_ptr": "*i32"}
SAMPLED = dict.fromkeys(("seed_ptr", "position_ptr", "token_ptr"), "*i64") | {
    f"{name}_ptr": kind
    for kind, names in (
        ("*fp32", "temperature best mass least wish share share_in above above_in wanted"),
        ("*i32", "first floor ties tied found found_in"),
    )
    for name in names.split()
}


def joined(first, second):
    rows, *padded = importlib.import_module("benthic.kernels.triton_heads").tiles(first, second)
    constants = {"HEADS": 16, "FIRST": first, "SECOND": second, "ROWS": rows}
    return constants | dict(zip(("FIRST_PAD", "SECOND_PAD"), padded, strict=True))


WEIGHTED = {"row_weight_ptr": "*fp32"}
MEMORY_BOUND = [
    ("triton_norm", "_norm_forward", {"HAS_RESIDUAL": True, "ROWS": 1, "WIDTH": 8192}, 8, {}),
    ("triton_norm", "_swiglu_forward", {"ROWS": 2, "WIDTH": 1024}, 4, {}),
    ("triton_norm", "_swiglu_backward", {"ROWS": 2, "WIDTH": 1024}, 4, {}),
    *(
        ("triton_norm", "_weighted_swiglu_backward", {"ROWS": rows, "WIDTH": 2048 // rows}, 4, WEIGHTED)
        for rows in (1, 8)
    ),
    *(
        ("triton_few_rows", "_gate", {"ROWS": rows, "EXPERTS": experts, "WIDTH": 4096 // experts}, 2, GATED)
        for rows in (1, 4)
        for experts in (1, 2)
    ),
    ("triton_rope", "_rotate", {"ROWS": 64, "HALF": 32}, 4, {}),
    *(
        ("triton_heads", "_join", joined(first, second), 4, {})
        for first, second in ((128, 64), (128, 128), (44, 9))
    ),
    *(
        (
            "triton_rope",
            "_rotate_and_norm",
            {"ROWS": 64, "HALF": 32, "NORM_ROWS": 8, "WIDTH": 512} | absent,
            4,
            kind,
        )
        for absent, kind in STORED
    ),
    ("triton_permute", "_spread_rows", {"TOP_K": 8, "WIDTH": 8192}, 16, {}),
    (
        "triton_permute",
        "_spread_tiles",
        {"TOP_K": 8, "WIDTH": 8192, "TILES": 64},
        16,
        {"values_ptr": "*u8", "out_values_ptr": "*u8", "scale_ptr": "*fp32", "out_scale_ptr": "*fp32"},
    ),
    ("triton_permute", "_gather_copies", {"TOP_K": 8, "WIDTH": 8192}, 16, {}),
    *(
        ("triton_permute_few", "_permute_few", few | {"SLOTS": slots}, 16, ROUTES | {"slot_ptr": "*i64"})
        for few in (
            {"PART": 1, "TOP_K": 8, "TOKENS": 16, "WIDTH": 8192},
            {"PART": 8, "TOP_K": 8, "TOKENS": 256, "WIDTH": 8192},
            {"PART": 6, "TOP_K": 6, "TOKENS": 1024, "WIDTH": 2048},
        )
        for slots in (False, True)
    ),
    *(
        (
            "triton_permute",
            "_sum_rows",
            {"WEIGHTED": True, "BESIDE": beside, "TOP_K": 8, "FEW": few, "WIDTH": 1024},
            2,
            {"row_ptr": "*i64"},
        )
        for beside in (0, 1, 2)
        for few in (False, True)
    ),
    *(
        (
            "triton_permute",
            "_sum_and_norm",
            {"BESIDE": beside, "TOP_K": top_k, "WIDTH": width},
            min(16, width // 128),
            {"row_ptr": "*i64", "weight_ptr": "*fp32", "eps": "fp32"},
        )
        for beside, top_k, width in ((2, 6, 2048), (1, 8, 8192))
    ),
    *(
        ("triton_route", "_route", {"SIGMOID": True, "BIASED": True, "NORMALISE": True} | gate, 4, GATE)
        for gate in (
            {"GROUPS": 1, "KEPT": 1, "BEST": 2, "TOP_K": 6, "CHOSEN": 8, "WIDTH": 64},
            {"GROUPS": 8, "KEPT": 4, "BEST": 2, "TOP_K": 8, "CHOSEN": 8, "WIDTH": 256},
        )
    ),
    *(
        ("triton_route", "_route_backward", way | {"TOP_K": 8, "CHOSEN": 8, "WIDTH": 256}, 4, GATE)
        for way in (
            {"SIGMOID": True, "NORMALISE": True, "SCORES": True, "WEIGHTS": True},
            {"SIGMOID": False, "NORMALISE": False, "SCORES": False, "WEIGHTS": True},
        )
    ),
    ("triton_routes", "_choose_ranks", {"TOP_K": 8, "BLOCK": 1024}, 4, ROUTES | {"goes_ptr": "*i1"}),
    ("triton_routes", "_place_departures", {"BLOCK": 1024, "RANKS": 8}, 4, ROUTES),
    *(
        ("triton_counting_sort", kernel, shape | {"TOP_K": 8, "PROGRAMS": 128} | part, 8, ROUTES)
        for shape in (
            {"EXPERTS": 8, "BLOCK": 512},
            {"EXPERTS": 64, "BLOCK": 64},
            {"EXPERTS": 256, "BLOCK": 16},
        )
        for kernel, part in (
            ("_count_copies", {}),
            ("_place_copies", {"PART": min(128, 4096 // shape["EXPERTS"])}),
        )
    ),
    *(
        (
            "triton_routes",
            "_home_slots",
            {"DWEIGHT": dweight, "TOP_K": 8, "TOKENS": 32, "RANKS": 8},
            4,
            ROUTES | ({} if dweight else {"side_ptr": "*i64", "dweight_ptr": "*i64"}),
        )
        for dweight in (True, False)
    ),
    ("triton_balance", "_loads", {"TOP_K": 8, "TOKENS": 8, "WIDTH": 256}, 4, BALANCE),
    ("triton_balance", "_sequence_loads", {"ROWS": 8, "WIDTH": 256}, 4, BALANCE),
    ("triton_balance", "_loss", {"BLOCK": 1024}, 4, BALANCE),
    ("triton_balance", "_balance_backward", {"TOKENS": 8, "WIDTH": 256}, 4, BALANCE),
    ("triton_balance", "_count", {"BLOCK": 4096}, 8, BALANCE),
    *(
        ("triton_sample", kernel, constants, 8, SAMPLED)
        for kernel, constants in (
            ("_weigh", {"PIECE": 4096}),
            ("_survey", {"MASS": True, "SPARE": 16, "STRETCH": 256, "PIECE": 4096, "PIECES": 64}),
            ("_conclude", {"MASS": True, "SPARE": 16, "PIECES": 64}),
            ("_settle", {"SPARE": 16, "PIECE": 4096, "PIECES": 64}),
            ("_draw", {"FILTERED": True, "SPARE": 16, "PIECE": 4096, "PIECES": 64}),
        )
    ),
    *(
        ("triton_best", kernel, constants, warps, BEST)
        for kernel, constants, warps in (
            ("_best_of_pieces", {"PIECE": 4096}, 4),
            ("_choose", {"PIECES": 64}, 1),
            ("_judge", {"QUERIES": 1, "PIECES": 64}, 1),
            ("_judge", {"QUERIES": 4, "PIECES": 64}, 1),
        )
    ),
    ("triton_moe", "_zero_rows", {"ROWS": 32, "WIDTH": 128}, 4, {}),
    ("triton_mla", "_combine", {"C": 512, "C_PAD": 512, "SPLITS": 8}, 4, {"part_ptr": "*fp32"}),
    *(
        (
            "gluon_mla_shares",
            "combine",
            {"PADDED": padded, "PARTS": parts, "ROWS": rows, "COLUMNS": columns},
            4,
            {"part_ptr": "*fp32"},
        )
        for padded, parts, rows, columns in (
            (16, 2, 4, 512),
            (16, 16, 1, 128),
            (128, 2, 4, 512),
            (128, 4, 2, 512),
        )
    ),
    ("triton_mla", "_copy", {"CHUNK": 8192}, 8, {}),
    *(
        (
            "triton_mla",
            "_store",
            {"C": 512, "C_PAD": 512, "R": 64, "R_PAD": 64, "ROWS": 4},
            4,
            kind,
        )
        for kind in ({}, E4M3)
    ),
    (
        "triton_attention_backward",
        "row_dots",
        {"HEADS": 16, "V": 128, "V_PAD": 128, "BLOCK_M": 64},
        4,
        {},
    ),
    (
        "triton_fp8",
        "_quantise_rows",
        {"POWER_OF_TWO": True, "ROWS": 16, "TILE": 128, "TILE_N": 128},
        4,
        {"values_ptr": "*fp8e4nv"},
    ),
    (
        "triton_fp8",
        "_quantise_blocks",
        {"POWER_OF_TWO": False, "TILE": 128, "BLOCK": 128},
        8,
        {"values_ptr": "*fp8e4nv"},
    ),
    *(
        (
            "triton_fp8",
            "_quantise_columns",
            {"RETILE": retile, "POWER_OF_TWO": False, "EXPERTS": experts, "TILE_R": 128, "COLUMNS": 64},
            8,
            {"values_ptr": "*fp8e4nv", "x_ptr": "*fp8e4nv" if retile else "*bf16"},
        )
        for retile in (False, True)
        for experts in (0, 64)
    ),
    (
        "triton_fp8_fused",
        "_quantise_both",
        {"POWER_OF_TWO": False, "EXPERTS": 64, "TILE": 128},
        8,
        {"row_values_ptr": "*fp8e4nv", "column_words_ptr": "*i32"},
    ),
    (
        "triton_fp8_fused",
        "_swiglu_rows",
        {"POWER_OF_TWO": False, "ROWS": 16, "TILE": 128},
        4,
        {"values_ptr": "*fp8e4nv"},
    ),
    *(
        (
            "triton_fp8_fused",
            "_norm_rows",
            {"HAS_RESIDUAL": added, "POWER_OF_TWO": False, "ROWS": rows, "WIDTH": width, "TILE": 128},
            warps,
            {"values_ptr": "*fp8e4nv"},
        )
        for added in (False, True)
        for rows, width, warps in ((1, 8192, 8), (2, 2048, 4))
    ),
    *(
        (
            "triton_e5m6",
            kernel,
            constants | {"WORDS": words, "ROWS": 16, "TILE": 128},
            4,
            {"packed_ptr": "*i32" if words else "*u8"},
        )
        for words in (True, False)
        for kernel, constants in (("_quantise", {"MAX": 65024.0, "FLOOR": 1e-30}), ("_dequantise", {}))
    ),
    *(
        ("triton_loss", "_turn", {"GRADIENT": more, "BLOCK": 16384}, 32, {"loss_ptr": "*fp32"})
        for more in (True, False)
    ),
    ("triton_sums", "_accumulate", {"FRESH": False, "BLOCK": 4096}, 8, {"sum_ptr": "*fp32"}),
    *(("triton_update", "_adamw", {"ROUND": each, "BLOCK": 2048}, 8, {}) for each in (True, False)),
    (
        "triton_update",
        "_adamw_split",
        {"BLOCK": 2048},
        8,
        {"weight_ptr": "*i16", "remainder_ptr": "*i16", "gradient_ptr": "*fp32"},
    ),
    *(
        (
            "triton_update",
            "_adamw_of_blocks",
            {"POWER_OF_TWO": False, "STOCHASTIC": stochastic, "TILE": 128, "PART": 16},
            8,
            {"values_ptr": "*fp8e4nv", "seed": "i64"},
        )
        for stochastic in (False, True)
    ),
    ("triton_turn", "_turn_bytes", {"SIDE": 32}, 4, {"from_ptr": "*i32", "to_ptr": "*i32"}),
    *(
        (
            "triton_fp8",
            "_dequantise",
            {"TILE_M": height, "TILE_N": 128, "ROWS": 32, "TILE": 128},
            4,
            {"values_ptr": "*fp8e4nv"},
        )
        for height in (1, 128)
    ),
]


@pytest.mark.parametrize(("module", "kernel", "constants", "warps", "overrides"), MEMORY_BOUND)
def test_memory_bound_kernels_do_not_spill(module, kernel, constants, warps, overrides, tmp_path):
    built = compiled(module, kernel, constants, warps=warps, overrides=overrides)
    assert_fits(resources(built, tmp_path))


@pytest.mark.parametrize("dtotal", [False, True])
@pytest.mark.parametrize("width", [512, 2048, 7168])
def test_the_norms_backward_has_enough_bytes_under_way(width, dtotal, tmp_path):
    norm = importlib.import_module("benthic.kernels.triton_norm")
    tensors = 2 + dtotal
    rows, padded, warps, stages = norm.backward_tile(width, 2 * tensors)
    constants = {"HAS_DTOTAL": dtotal, "ROWS": rows, "WIDTH": padded, "STAGES": stages}
    built = compiled("triton_norm", "_norm_backward", constants, warps=warps)
    used = resources(built, tmp_path)
    assert_fits(used)
    assert built.asm["ptx"].count("cp.async.cg.shared.global") > 0
    programs = min(65536 // (32 * warps * used.registers), 227 * 1024 // (used.shared + 1024))
    assert programs * warps >= 16
    assert programs * (stages - 1) * rows * width * 2 * tensors > 4.2e12 * 1.2e-6 / 132


SUMS = [
    ("_sum_rows", {"WEIGHTED": True, "BESIDE": 0, "TOP_K": 8, "FEW": few, "WIDTH": 1024}, 2, each)
    for few, each in ((False, 9.0), (True, 2.5))
]


@pytest.mark.parametrize(
    ("kernel", "constants", "warps", "rows"),
    [*SUMS, ("_sum_rows_backward", {"TOP_K": 8, "WIDTH": 8192}, 16, 4.0)],
)
def test_sums_of_copies_have_enough_programs_for_the_rows_of_a_rank(
    kernel, constants, warps, rows, tmp_path
):  # fmt: skip
    """`rows` of a program's width, read and written, in the 2.7 us that one takes for its chain of loads."""
    built = compiled("triton_permute", kernel, constants, warps=warps, overrides={"weight_ptr": "*fp32"})
    used = resources(built, tmp_path)
    assert_fits(used)
    programs = min(65536 // (32 * warps * used.registers), 32, 64 // warps)
    width = min(constants["WIDTH"], 7168)
    assert programs * rows * width * 2 > 4.2e12 * 2.7e-6 / 132


def few_rows(kernel, **more):
    tiling = {"BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_K": 128, "EXPERTS": 0, "WHOLE": True}
    return ("triton_few_rows", kernel, tiling | more, 4, {})


FP8_PRODUCT = {"EMULATE": False, "STAGES": 4}
EARLY = [
    *(each for each in MEMORY_BOUND if "PDL" in kernel_of(*each[:2]).arg_names),
    *(few_rows("_few_rows", EXPERTS=experts, **PLAIN_PRODUCT) for experts in (0, 64)),
    *(few_rows("_few_rows", EXPERTS=experts, **PLAIN_PRODUCT | {"GATED": True}) for experts in (0, 64)),
    *(few_rows("_few_rows_of_blocks", GROUPED=grouped, **FP8_PRODUCT) for grouped in (False, True)),
]


def held(columns, width):
    own, warps, part = importlib.import_module("benthic.kernels.triton_few_rows").held(columns)
    chunks, rest = divmod(width, warps * part)
    constants = {"OWN": own, "WARPS": warps, "WIDTH": part, "PRECISION": "tf32"}
    return constants | {"CHUNKS": chunks + (rest > 0), "WHOLE": rest == 0}


HELD = [(3072, 2048), (576, 2048), (2048, 2048), (5632, 2048), (2048, 2816), (576, 4096), (2048, 4096)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("columns", "width"), HELD)
def test_all_weights_of_a_product_are_on_their_way_before_it_waits_and_nothing_else_is(
    columns, width, dtype, tmp_path
):
    constants = held(columns, width)
    built = compiled(
        "triton_few_rows", "_linear", constants | {"PDL": True}, dtype=dtype, warps=constants["WARPS"]
    )
    used = resources(built, tmp_path)
    assert_fits(used)
    assert used.registers <= (128 if width <= 2048 else 255)  # two programs run on a multiprocessor
    before, after = re.split(r"griddepcontrol\.wait\s*;", built.asm["ptx"])
    assert "griddepcontrol.launch_dependents" in before
    # 16 columns of weights are twice as many bytes as 8 rows
    assert before.count("ld.global.v4.b32") == before.count("ld.global") == 8 * constants["CHUNKS"]
    assert after.count("ld.global.v4.b32") == after.count("ld.global") == 4 * constants["CHUNKS"]
    assert not re.search(r"\b(st|red|atom)\.|cp\.async|ld\.shared|ldmatrix|bar\.sync", before)
    assert "mma.sync" in after


@pytest.mark.parametrize(("module", "kernel", "constants", "warps", "overrides"), EARLY)
def test_a_kernel_launched_early_touches_no_memory_before_it_has_waited(
    module, kernel, constants, warps, overrides, tmp_path
):
    """But weights of the gate and of norms, which nothing writes during a step."""
    if kernel == "_few_rows_of_blocks":
        overrides = dict.fromkeys(("x_ptr", "weight_ptr"), "*fp8e4nv")
    built = compiled(module, kernel, constants | {"PDL": True}, warps=warps, overrides=overrides)
    assert_fits(resources(built, tmp_path))
    ptx = built.asm["ptx"]
    before, after = re.split(r"griddepcontrol\.wait\s*;", ptx)
    assert not re.search(r"\b(st|red|atom)\.|cp\.async", before)
    assert ("ld.global" in before) == (kernel in ("_gate", "_sum_and_norm"))
    assert "griddepcontrol.launch_dependents" in before
    assert "ld.global" in after or "cp.async" in after
    plain = compiled(module, kernel, constants, warps=warps, overrides=overrides)
    assert "griddepcontrol" not in plain.asm["ptx"]


@pytest.mark.parametrize(("first", "second"), [(128, 64), (128, 128)])
def test_parts_of_heads_move_sixteen_bytes_at_a_time(first, second):
    ptx = compiled("triton_heads", "_join", joined(first, second)).asm["ptx"]
    for access in ("ld", "st"):
        moves = re.findall(rf"{access}\.global\S*", ptx)
        assert moves
        assert all(move.endswith("v4.b32") for move in moves), moves


def layout_of_first_sum(built):
    text = built.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    return layouts[re.search(r"\}\) : \(tensor<[\dx]+xf32, (#\w+)>\) ->", text).group(1)]


@pytest.mark.parametrize(("absent", "kind"), STORED[1:])
@pytest.mark.parametrize(("width", "dtype"), [(100, "bf16"), (512, "bf16"), (512, "fp16"), (512, "fp32")])
def test_a_norm_that_writes_to_a_cache_sums_in_the_order_of_the_plain_norm(width, dtype, absent, kind):
    rows, padded, warps = importlib.import_module("benthic.kernels.host").row_tile(width, 4096)
    constants = {"ROWS": 64, "HALF": 32, "NORM_ROWS": rows, "WIDTH": padded}
    plain, fused = (
        compiled(
            "triton_rope", "_rotate_and_norm", constants | none, dtype=dtype, warps=warps, overrides=types
        )
        for none, types in ((PAGES, {}), (absent, kind))
    )
    assert layout_of_first_sum(fused) == layout_of_first_sum(plain)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("width", [100, 512, 2048, 7168])
def test_a_norm_that_quantises_sums_in_the_order_of_the_plain_norm(width, added):
    norm, fused = (
        importlib.import_module(f"benthic.kernels.{m}") for m in ("triton_norm", "triton_fp8_fused")
    )
    rows, padded, warps = fused.norm_tile(width)
    assert norm.row_tile(width, 4096) == (rows, padded, warps)
    constants = {"HAS_RESIDUAL": added, "ROWS": rows, "WIDTH": padded}
    plain = compiled("triton_norm", "_norm_forward", constants, warps=warps)
    constants |= {"POWER_OF_TWO": False, "TILE": 128}
    kinds = {"values_ptr": "*fp8e4nv"}
    built = compiled("triton_fp8_fused", "_norm_rows", constants, warps=warps, overrides=kinds)
    assert layout_of_first_sum(built) == layout_of_first_sum(plain)


EXCHANGE = [
    (
        "_push_tokens",
        {"CHOICE": True, "RANKS": 8, "TOP_K": 8, "TOP_K_PAD": 8, "WORDS": 4096},
        {"x_ptr": "*i32", "expert_ptr": "*i32", "weight_ptr": "*i32"},
    ),
    (
        "_push_tokens",
        {"CHOICE": False, "RANKS": 2, "TOP_K": 6, "TOP_K_PAD": 8, "WORDS": 1024},
        {"x_ptr": "*i32", "expert_ptr": "*i32", "weight_ptr": "*i32"},
    ),
    (
        "_push_sums",
        {"WEIGHTED": True, "DWEIGHT": False, "TOP_K": 8, "TOP_K_PAD": 8, "FEW": True, "WIDTH": 1024},
        {"weight_ptr": "*fp32", "dweight_ptr": "*fp32"},
    ),
    (
        "_push_sums",
        {"WEIGHTED": False, "DWEIGHT": True, "TOP_K": 8, "TOP_K_PAD": 8, "FEW": False, "WIDTH": 1024},
        {"weight_ptr": "*fp32", "dweight_ptr": "*fp32"},
    ),
]


@pytest.mark.parametrize(("kernel", "constants", "types"), EXCHANGE)
def test_rows_are_pushed_to_peers_in_16_byte_stores_without_spills(kernel, constants, types, tmp_path):
    tables = {"rows_table": "*i64", "choice_table": "*i64", "dweight_table": "*i64"}
    width = constants.get("WORDS") or constants["WIDTH"]
    built = compiled(
        "triton_exchange",
        kernel,
        constants,
        warps=min(16, width // 512),
        overrides=types | tables,
    )
    assert_fits(resources(built, tmp_path))
    assert re.search(r"st\.global\.v4\.b32", built.asm["ptx"])


@pytest.mark.parametrize(("kernel", "order"), [("_raise_flags", "release"), ("_await_flags", "acquire")])
def test_flags_order_memory_between_gpus(kernel, order):
    types = {"flags_table": "*i64", "flags_ptr": "*i32"}
    built = compiled("triton_exchange", kernel, {"RANKS": 8}, warps=1, overrides=types)
    assert built.asm["ptx"].count(f"atom.global.{order}.sys.cas.b32") >= 8


def test_counting_copies_spills_nothing(tmp_path):
    types = {"choice_ptr": "*i32", "count_ptr": "*i32"}
    built = compiled(
        "triton_exchange", "_count_copies", {"TOP_K": 8, "BLOCK": 4096}, warps=16, overrides=types
    )
    assert_fits(resources(built, tmp_path))


@pytest.mark.parametrize("sequences", [1, 64, 4096])
def test_lists_of_tiles_spill_nothing(sequences, tmp_path):
    constants = {"TILE": 128, "SEQUENCES": sequences, "PLACES": max(1, min(64, 8192 // sequences))}
    of_packs = {"starts_ptr": "*i32", "list_ptr": "*i32"}
    built = compiled("triton_pack_tiles", "_list_tiles", constants | {"LAST_FIRST": True}, overrides=of_packs)
    assert_fits(resources(built, tmp_path))
