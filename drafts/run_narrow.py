"""Bits and times of narrow kernels on a GPU: squares (both ways, columns, retiled) and norms."""
import statistics
import sys

import torch

from benthic.kernels import ops
from benthic.kernels import gluon_fp8_squares as squares
from benthic.kernels import triton_fp8_fused as fused

DEV, E4M3 = "cuda", torch.float8_e4m3fn
torch.manual_seed(0)
bad = 0


def check(name, found, wanted):
    global bad
    wrong = (found.values.view(torch.uint8) != wanted.values.view(torch.uint8)).sum().item()
    scales = (found.scale != wanted.scale).sum().item()
    if wrong or scales or found.values.shape != wanted.values.shape:
        bad += 1
        at = (found.values.view(torch.uint8) != wanted.values.view(torch.uint8)).nonzero()[:3].tolist()
        print(f"WRONG {name}: {wrong} of {found.values.numel()} values, {scales} scales, {at}", flush=True)


def data(rows, columns, dtype, nan=True):
    x = torch.randn(rows, columns, device=DEV).mul_(torch.rand(rows, 1, device=DEV).mul(12).sub(8).exp2()).to(dtype)
    if rows > 140:
        x[130:140] = 0
    x[rows // 2, columns // 2] = -0.0
    if nan:
        x[rows // 3, 7] = float("nan")
    return x


def bits():
    cases = [
        (2048, 2048, None, torch.bfloat16, False), (129, 144, None, torch.bfloat16, True),
        (2000, 384, (0, 300, 300, 1733), torch.bfloat16, False), (257, 128, (1, 2), torch.float16, False),
        (3008, 2816, tuple(range(40, 2600, 40)), torch.bfloat16, True),
        (515, 272, (0, 0, 515, 515), torch.bfloat16, False),
    ]
    for rows, columns, ends, dtype, p in cases:
        x = data(rows, columns, dtype, nan=rows != 3008)
        e = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEV)
        name = f"{rows}x{columns} {ends and len(ends)} {dtype} p2={p}"
        by_row = ops.Fp8(*ops.quantise_fp8_rows(x, power_of_two=p, by_column=True))
        by_column = ops.quantise_fp8_columns(x, e, power_of_two=p, impl="triton")
        new = ops.quantise_fp8_both(x, e, power_of_two=p, impl="gluon")
        check("both rows " + name, new[0], by_row)
        check("both columns " + name, new[1], by_column)
        check("columns " + name, ops.quantise_fp8_columns(x, e, power_of_two=p, impl="gluon"), by_column)
        retiled = ops.retile_fp8(by_row, e, power_of_two=p, impl="gluon")
        check("retile " + name, retiled, ops.retile_fp8(by_row, e, power_of_two=p, impl="triton"))
        if not x.isnan().any():
            exact = ops.quantise_fp8_both(x, e, power_of_two=p, impl="reference")
            check("reference rows " + name, new[0], exact[0])
            check("reference columns " + name, new[1], exact[1])
            check("reference retile " + name, retiled, ops.retile_fp8(exact[0], e, power_of_two=p, impl="reference"))
    x = data(600, 2048, torch.bfloat16, nan=False)
    exact = ops.quantise_fp8_both(x, None, impl="reference")
    new = ops.quantise_fp8_both(x, None, impl="gluon")
    check("reference rows", new[0], exact[0])
    check("reference columns", new[1], exact[1])
    check("reference retile", ops.retile_fp8(new[0], impl="gluon"), ops.retile_fp8(exact[0], impl="reference"))
    for rows, width in ((33, 2048), (257, 7168), (5, 512)):
        for p in (False,) if width != 2048 else (False, True):
            x, w = data(rows, width, torch.bfloat16), torch.randn(width, device=DEV, dtype=torch.bfloat16)
            r = data(rows, width, torch.bfloat16, nan=False)
            normed = ops.rms_norm(x, w, 1e-6)
            check(f"norm {rows}x{width}", ops.rms_norm_fp8(x, w, 1e-6, power_of_two=p),
                  ops.Fp8(*ops.quantise_fp8_rows(normed, power_of_two=p)))
            normed, total = ops.add_rms_norm(x, r, w, 1e-6)
            found, sums = ops.add_rms_norm_fp8(x, r, w, 1e-6, power_of_two=p)
            check(f"add norm {rows}x{width}", found, ops.Fp8(*ops.quantise_fp8_rows(normed, power_of_two=p)))
            gated = ops.swiglu(x) if width % 256 == 0 else None
            if gated is not None:
                check(f"swiglu {rows}x{width}", ops.swiglu_fp8(x, power_of_two=p),
                      ops.Fp8(*ops.quantise_fp8_rows(gated, power_of_two=p)))
    torch.cuda.synchronize()
    print("bits:", "equal" if not bad else f"{bad} cases WRONG", flush=True)


def clock(call, repeats=20):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in times) * 1e3


def line(name, count, call):
    us = clock(call)
    print(f"{name:34s} {us:8.1f} us {count / us / 1e6:5.2f} TB/s", flush=True)


def times():
    for rows, columns in ((16384, 2048), (32768, 7168), (98304, 1408), (98304, 2816)):
        n = rows * columns
        x = torch.randn(rows, columns, device=DEV, dtype=torch.bfloat16)
        ends = torch.linspace(rows // 64, rows, 64, device=DEV).round().to(torch.int32)
        a, b = torch.empty(2 * n, device=DEV, dtype=torch.uint8), torch.empty(2 * n, device=DEV, dtype=torch.uint8)
        line(f"{rows}x{columns} copy", 4 * n, lambda: b.copy_(a))
        by = ops.Fp8(*ops.quantise_fp8_rows(x, by_column=True))
        for e, label in ((None, ""), (ends, " 64 experts")):
            line(f"{rows}x{columns} both old{label}", 4 * n, lambda: fused.quantise_both(x, e, power_of_two=False))
            line(f"{rows}x{columns} both new{label}", 4 * n, lambda: ops.quantise_fp8_both(x, e, impl="gluon"))
            line(f"{rows}x{columns} columns old{label}", 3 * n, lambda: ops.quantise_fp8_columns(x, e, impl="triton"))
            line(f"{rows}x{columns} columns new{label}", 3 * n, lambda: ops.quantise_fp8_columns(x, e, impl="gluon"))
            line(f"{rows}x{columns} retile old{label}", 2 * n, lambda: ops.retile_fp8(by, e, impl="triton"))
            line(f"{rows}x{columns} retile new{label}", 2 * n, lambda: ops.retile_fp8(by, e, impl="gluon"))
            if columns == 2048:
                break
        keep = squares.PROGRAMS, squares.RETILE_PROGRAMS
        for programs, registers in ((3, 168), (8, 128)):
            squares.PROGRAMS = (programs, registers)
            line(f"{rows}x{columns} both {programs} programs", 4 * n, lambda: ops.quantise_fp8_both(x, impl="gluon"))
        for programs, registers in ((4, 128), (3, 168), (10, 96)):
            squares.RETILE_PROGRAMS = (programs, registers)
            line(f"{rows}x{columns} retile {programs} programs", 2 * n, lambda: ops.retile_fp8(by, impl="gluon"))
        squares.PROGRAMS, squares.RETILE_PROGRAMS = keep
        del x, a, b, by
    pairs = fused.has_pairs
    for rows, width in ((32768, 7168), (16384, 2048)):
        x, w = torch.randn(rows, width, device=DEV).bfloat16(), torch.randn(width, device=DEV).bfloat16()
        for label, has in (("one by one", lambda _: False), ("pairs", pairs)):
            fused.has_pairs = has
            line(f"{rows}x{width} rms_norm_fp8 {label}", 3 * rows * width, lambda: ops.rms_norm_fp8(x, w, 1e-6))
            line(f"{rows}x{width} add_norm_fp8 {label}", 7 * rows * width,
                 lambda: ops.add_rms_norm_fp8(x, x, w, 1e-6))
            line(f"{rows}x{width} swiglu_fp8 {label}", 5 * rows * width // 2, lambda: ops.swiglu_fp8(x))


torch.set_grad_enabled(False)
flush = torch.empty(64 << 20, device=DEV, dtype=torch.int32)
print(torch.cuda.get_device_name(), torch.__version__, __import__("triton").__version__)
if "times" not in sys.argv:
    bits()
if "bits" not in sys.argv:
    times()
