"""Where each way to multiply in FP8 runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional as F

from benthic.kernels.fp8_waves import fastest
from benthic.kernels.reference.fp8_linear import TILE
from benthic.kernels.table import hopper_refusal, no, triton_refusal, triton_runs, yes

if TYPE_CHECKING:
    from benthic.kernels.table import Case, Verdict

FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)


def cublas(case: Case) -> Verdict:
    """Block-scaled products of cuBLAS (CUDA 12.9): 1028-1161 TFLOP/s at V3's shapes on an H200."""
    if case.device != "cuda":
        return no(f"runs on cuda, not {case.device}")
    if not hasattr(F, "scaled_mm"):
        return no(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm")
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return no(f"block scales in float32 are Hopper's, not sm_{torch.cuda.get_device_capability()[0]}x's")
    if case.dtype not in (torch.bfloat16, torch.float32):
        return no(f"gives bfloat16 and float32, not {case.dtype}")
    inner, outer = case.dims
    if inner % TILE or outer % 16:
        return no(f"needs K a multiple of {TILE} and N of 16, not {inner} and {outer}")
    return yes("cuBLAS with 1x128 and 128x128 scales (H200: 1028-1161 TFLOP/s)")


def gluon(case: Case) -> Verdict:
    """Tiles by TMA, products by wgmma (docs/adr/0025)."""
    if case.device != "cuda" or case.dtype not in FLOATS:
        return no(f"runs on cuda and gives floats of 16 and 32 bits, not {case.dtype} on {case.device}")
    if (refusal := triton_refusal("cuda") or hopper_refusal()) is not None:
        return no(refusal)
    if case.dims[0] % 16:
        return no(f"needs K a multiple of 16 bytes, not {case.dims[0]}")
    return yes("our block-scaled product for Hopper: a warp loads, groups multiply and promote in turn")


@functools.lru_cache(maxsize=4096)
def fastest_dense(rows: int, outer: int, inner: int, device: torch.device) -> str:
    """The way to multiply with one weight whose tiles leave least idle; see `fp8_waves`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return fastest(rows, outer, inner, processors)


def gluon_dense(case: Case) -> Verdict:
    """`gluon`, where it is the fastest or cuBLAS cannot run."""
    verdict = gluon(case)
    if verdict.runs and case.fastest != "gluon" and cublas(case).runs:
        return no("is done later than cuBLAS with as many tiles")
    return verdict


def gluon_tall_dense(case: Case) -> Verdict:
    """`gluon_tall`, where it is the fastest."""
    verdict = gluon_tall(case)
    if verdict.runs and case.fastest != "gluon_three":
        return no("is done later than others with as many tiles")
    return verdict


def gluon_tall(case: Case) -> Verdict:
    """`gluon`, for results that leave by TMA; 1,200 to 1,250 TFLOP/s on an H200 where its tiles are full."""
    verdict = gluon(case)
    if verdict.runs and (case.dtype == torch.float32 or case.dims[1] % 8):
        return no(f"gives rows of a multiple of 8 in 16 bits, not {case.dims[1]} in {case.dtype}")
    return verdict


def gluon_split(case: Case) -> Verdict:
    """Whole GPUs for weights of few tiles; results leave by TMA, as those of `gluon_tall`."""
    if case.many:
        return no("is made for some dozens of rows")
    verdict = gluon_tall(case)
    return yes("every multiprocessor reads its share of the weight") if verdict.runs else verdict


def gluon_tall_first(case: Case) -> Verdict:
    """`gluon_tall`, where there are rows enough for tiles of 192."""
    return gluon_tall(case) if case.many else no("is made for many rows a weight")


def gluon_gradient(case: Case) -> Verdict:
    """`gluon`, for weights whose widths are multiples of 16."""
    if case.dims[1] % 16:
        return no(f"needs widths of a multiple of 16, not {case.dims[1]}")
    return gluon(case)


def gluon_squares(case: Case) -> Verdict:
    """Squares by TMA, for rows that begin and step by multiples of 16 values."""
    if case.device != "cuda" or case.dtype not in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        return no(f"runs on cuda in bfloat16, float16 and E4M3, not in {case.dtype} on {case.device}")
    if (refusal := triton_refusal("cuda") or hopper_refusal()) is not None:
        return no(refusal)
    if case.dims[0] % 16:
        return no(f"needs a multiple of 16 columns, not {case.dims[0]}")
    if not case.many:
        return no("saves less than its launch, with a descriptor, costs the host: is made for many values")
    return yes("squares come by TMA, and each of its values takes half the instructions")


def gluon_square_pairs(case: Case) -> Verdict:
    """`gluon_squares`, for gates and ups of which no square holds both."""
    if case.dtype == torch.float8_e4m3fn or case.dims[0] % TILE:
        return no(f"needs floats and a multiple of {TILE} gates, not {case.dtype} and {case.dims[0]}")
    verdict = gluon_squares(case)
    return yes("one pass instead of two: no wide gradient is written") if verdict.runs else verdict


def turns_words(case: Case) -> Verdict:
    """Four bytes at once, both ways."""
    if any(width % 4 for width in case.dims):
        return no(f"needs matrices of whole words of 4 bytes, not {list(case.dims)}")
    return triton_runs(torch.float8_e4m3fn, reason="one pass over words of four values")(case)
