"""RMSNorm backward on one H200: old and new kernels against float64, timed beside a copy. PYTHONPATH=src."""
import itertools, statistics, time
import torch, triton, triton.language as tl
from benthic.kernels import ops

DRY = not torch.cuda.is_available()  # TRITON_INTERPRET=1: small, no times
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16
T0 = time.time()


@triton.jit(do_not_specialize=["rows"])
def old_kernel(x_ptr, weight_ptr, rstd_ptr, dy_ptr, dtotal_ptr, dx_ptr, dweight_ptr, rows, width, x_stride,
               HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([WIDTH], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x_hat = x * rstd[:, None]
        weighted = dy * weight[None, :]
        mean = tl.sum(weighted * x_hat, axis=1) / width
        dx = (weighted - x_hat * mean[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(dy * x_hat, axis=0)
    tl.store(dweight_ptr + program * width + column, dweight, mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def ahead_kernel(x_ptr, weight_ptr, rstd_ptr, dy_ptr, dtotal_ptr, dx_ptr, dweight_ptr, rows, width, x_stride,
                 HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The next tile is loaded into registers before this one is summed."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    kept = (column < width)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    step = tl.num_programs(0) * ROWS
    row = program * ROWS + tl.arange(0, ROWS).to(tl.int64)
    mask = (row < rows)[:, None] & kept
    x_next = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    dy_next = tl.load(dy_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    rstd_next = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    for _ in range(program * ROWS, rows, step):
        mask = (row < rows)[:, None] & kept
        place = row[:, None] * width + column[None, :]
        x, dy, rstd = x_next.to(tl.float32), dy_next.to(tl.float32), rstd_next
        if HAS_DTOTAL:
            dtotal = tl.load(dtotal_ptr + place, mask=mask, other=0.0)
        row += step
        follows = (row < rows)[:, None] & kept
        x_next = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=follows, other=0.0)
        dy_next = tl.load(dy_ptr + row[:, None] * width + column[None, :], mask=follows, other=0.0)
        rstd_next = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x_hat = x * rstd[:, None]
        weighted = dy * weight[None, :]
        mean = tl.sum(weighted * x_hat, axis=1) / width
        dx = (weighted - x_hat * mean[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * x_hat
    tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def staged_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dtotal_ptr, dx_ptr, dweight_ptr,
    rows, width, x_stride,
    HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """While a tile is summed, the `STAGES - 1` tiles after it are on their way to shared memory."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x_hat = x * rstd[:, None]
        weighted = dy * weight[None, :]
        mean = tl.sum(weighted * x_hat, axis=1) / width
        dx = (weighted - x_hat * mean[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * x_hat
    tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(part_ptr, dweight_ptr, programs, width, PROGRAMS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([PROGRAMS, WIDTH], tl.float32)
    for first in tl.range(0, programs, PROGRAMS, num_stages=3):
        program = first + tl.arange(0, PROGRAMS)
        mask = (program < programs)[:, None] & (column < width)[None, :]
        total += tl.load(part_ptr + program[:, None] * width + column[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + column, out, mask=column < width)


def torch_sum(partial, weight):
    return partial.sum(dim=0).to(weight.dtype)


def triton_sum(partial, weight):
    out = torch.empty_like(weight)
    programs, width = partial.shape
    sum_kernel[(triton.cdiv(width, 16),)](partial, out, programs, width, PROGRAMS=128, WIDTH=16, num_warps=4)
    return out


def clock(call, operands, repeats=25):
    """Median microseconds over rotating operands."""
    for operand in operands:
        call(*operand)
    if DRY:
        return 1.0
    rotation = itertools.cycle(operands)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(60_000_000)
    for start, end in pairs:
        operand = next(rotation)
        start.record()
        call(*operand)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in pairs)


def relative(fast, exact):
    return float((fast.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def exact_gradients(x, weight, dy, dtotal):
    x, weight, dy = x.double(), weight.double(), dy.double()
    rstd = (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    x_hat, weighted = x * rstd, dy * weight
    dx = (weighted - x_hat * (weighted * x_hat).mean(1, keepdim=True)) * rstd
    return (dx if dtotal is None else dx + dtotal.double()), (dy * x_hat).sum(0), rstd[:, 0].float()


def variants(width, staged):
    """(name, kernel, rows, warps, stages, programs)."""
    new = staged_kernel
    if width > 4096:
        yield "old", old_kernel, 1, 16, None, 1056
        yield "ahead", ahead_kernel, 1, 16, None, 264
        for stages in (3, 4) if not staged else (2, 3):
            for programs in (132, 264, 528):
                yield f"staged {stages}", new, 1, 16, stages, programs
        return
    yield "old", old_kernel, 2, 4, None, 1056
    yield "ahead", ahead_kernel, 1, 4, None, 528
    for programs in (528, 1056):
        yield "staged 4", new, 1, 4, 4, programs
    yield "staged 4", new, 2, 8, 4, 264


def shape(rows, width):
    random = lambda *s: torch.randn(*s, device=DEVICE).to(DTYPE)
    item = DTYPE.itemsize
    count = 1 if DRY else max(2, -(-(300 << 20) // (3 * rows * width * item)))
    sets = [(random(rows, width), random(rows, width), random(rows, width)) for _ in range(count)]
    weight = (1 + 0.1 * torch.randn(width, device=DEVICE)).to(DTYPE)
    outs = [torch.empty_like(x) for x, _, _ in sets]
    us = clock(lambda x, o: o.copy_(x), [(s[0], o) for s, o in zip(sets, outs)])
    roof = 2 * rows * width * item / us / 1e6
    print(f"\n{rows} x {width}  copy {us:.1f} us {roof:.2f} TB/s   ({count} sets)", flush=True)
    print("dtotal variant    rows warps programs | kernel us TB/s of copy | all us  TB/s | Triton's sum: all us TB/s | dx err  dw err  dx differs from old")
    for has in (False, True):
        x, dy, dtotal = sets[0]
        dx_64, dw_64, rstd = exact_gradients(x, weight, dy, dtotal if has else None)
        rstds = [exact_rstd(s[0]) for s in sets]
        moved = (4 if has else 3) * rows * width * item
        first = None
        for name, kernel, block, warps, stages, programs in variants(width, has):
            partial = torch.full((programs, width), float("nan"), device=DEVICE)
            more = {} if stages is None else {"STAGES": stages}

            def run(x, dy, dtotal, rstd, out, total=None):
                kernel[(programs,)](x, weight, rstd, dy, dtotal if has else dy, out, partial, rows, width, x.stride(0),
                                    HAS_DTOTAL=has, ROWS=block, WIDTH=triton.next_power_of_2(width), num_warps=warps, **more)
                return total(partial, weight) if total else None

            outs[0].fill_(float("nan"))
            operands = [(*s, r, o) for s, r, o in zip(sets, rstds, outs)]
            try:
                run(*operands[0])
                errors = relative(outs[0], dx_64), relative(partial.sum(0), dw_64)
                assert relative(triton_sum(partial, weight.float()), dw_64) < 1e-4
                first = outs[0].clone() if first is None else first
                differs = int((outs[0] != first).sum())
                us = clock(run, operands)
                both = [clock(run, [(*o, s) for o in operands]) for s in (torch_sum, triton_sum)]
            except Exception as error:  # one variant that fails leaves the others
                print(f"{has!s:6} {name} {programs}: {type(error).__name__} {str(error)[:150]}", flush=True)
                continue
            bad = "" if errors[0] < (1e-5 if DRY else 4e-3) and errors[1] < 1e-4 else "  WRONG"
            rate = moved / us / 1e6
            print(f"{has!s:6} {name:10} {block:4} {warps:5} {programs:8} | {us:9.1f} {rate:4.2f} {rate / roof:6.2f} | "
                  f"{both[0]:7.1f} {moved / both[0] / 1e6:4.2f} | {both[1]:7.1f} {moved / both[1] / 1e6:4.2f} | "
                  f"{errors[0]:.1e} {errors[1]:.1e} {differs}{bad}", flush=True)
        del dx_64, first
    # what autograd runs, as the bench times it
    weight.requires_grad_()
    pairs = []
    for x, dy, _ in sets:
        x = x.requires_grad_()
        pairs.append((ops.rms_norm(x, weight, 1e-6, impl="triton"), x, dy))
    us = clock(lambda y, x, dy: torch.autograd.grad(y, (x, weight), dy, retain_graph=True), pairs)
    moved = 3 * rows * width * item
    print(f"autograd of this checkout: {us:.1f} us {moved / us / 1e6:.2f} TB/s, {moved / us / 1e6 / roof:.2f} of copy; {time.time() - T0:.0f} s", flush=True)


def exact_rstd(x):
    return (x.double().square().mean(1) + 1e-6).rsqrt().float()


torch.manual_seed(0)
for rows, width in ((3, 4200), (21, 128)) if DRY else ((32768, 7168), (16384, 2048)):
    shape(rows, width)
