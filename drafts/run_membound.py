"""Kernels bound by memory on one H200: old and new, checked against each other's bits, timed beside a copy.

    PYTHONPATH=src python drafts/run_membound.py
"""
import itertools, statistics, time
import torch, triton, triton.language as tl
from benthic.kernels import triton_fp8_fused as fused, triton_permute as moves
from benthic.kernels.reference.fp8_linear import TILE, padded_rows
from benthic.kernels.triton_e4m3 import tile_scale
from benthic.kernels.triton_fp8_fused import _bytes, _rows_of, _store_rows
from benthic.kernels.triton_tiles import find_tile, groups

DRY = not torch.cuda.is_available()  # TRITON_INTERPRET=1: small, no times
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16
ITEM = DTYPE.itemsize
T0 = time.time()


@triton.jit
def old_sum_of_rows(
    rows_ptr, weight_ptr, row_ptr, token, column, width, stride,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The float32 sum of one token, in the order of k; a negative row is skipped."""
    acc = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k)
        kept = column < tl.where(row >= 0, width, 0)
        value = tl.load(rows_ptr + row * stride + column, mask=kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_ptr + token * TOP_K + k).to(tl.float32)
        acc += value
    return acc


@triton.jit
def old_sum_rows(
    rows_ptr, weight_ptr, row_ptr, out_ptr, beside1_ptr, beside2_ptr, width, stride,
    WEIGHTED: tl.constexpr, BESIDE: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order, of weight[t, k] * rows[row[t, k]], added to BESIDE tensors."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    at, kept = token * width + column, column < width
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = old_sum_of_rows(rows_ptr, weight_ptr, row_ptr, token, column, width, stride, WEIGHTED, TOP_K, WIDTH)
    if BESIDE > 0:  # every sum is rounded, as by kernels of their own
        beside = tl.load(beside1_ptr + at, mask=kept, other=0.0).to(tl.float32)
        if BESIDE > 1:
            beside += tl.load(beside2_ptr + at, mask=kept, other=0.0).to(tl.float32)
            beside = beside.to(dtype).to(tl.float32)
        acc = beside + acc.to(dtype).to(tl.float32)
    tl.store(out_ptr + at, acc.to(dtype), mask=kept)


@triton.jit
def old_sum_rows_backward(
    rows_ptr, weight_ptr, row_ptr, dout_ptr, drows_ptr, dweight_ptr, width, stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """drows[row[t, k]] = weight[t, k] * dout[t]; dweight[t, k] = dout[t] . rows[row[t, k]]. Each row once.

    A negative row is skipped; its weight's gradient is 0.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    dout = tl.load(dout_ptr + token * width + column, mask=column < width, other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k)
        kept = column < tl.where(row >= 0, width, 0)
        weight = tl.load(weight_ptr + token * TOP_K + k).to(tl.float32)
        value = tl.load(rows_ptr + row * stride + column, mask=kept, other=0.0).to(tl.float32)
        tl.store(drows_ptr + row * width + column, (weight * dout).to(drows_ptr.dtype.element_ty), mask=kept)
        tl.store(dweight_ptr + token * TOP_K + k, tl.sum(dout * value, axis=0))


@triton.jit(do_not_specialize=["rows"])
def old_quantise_both(
    x_ptr, row_values_ptr, row_scale_ptr, column_words_ptr, column_scale_ptr, ends_ptr,
    rows, experts, columns, word_dim, stride,
    row_scale_stride, row_tile_stride, column_scale_stride, column_tile_stride,
    POWER_OF_TWO: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A square of one expert's rows, read once: a scale for each of its rows and one for each of its columns.

    A thread holds four rows of a column, so columns are turned round as words of four values.
    """
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    expert, start, end = find_tile(ends_ptr, tile, rows, experts, TILE, EXPERTS)
    row, within = start + 4 * tl.arange(0, TILE // 4), tl.arange(0, TILE)
    column = column_tile * TILE + within
    x_ptr += column_tile * TILE
    row_values_ptr += column_tile * TILE
    left = columns - column_tile * TILE
    x_0 = _rows_of(x_ptr, row, end, left, stride, TILE)
    x_1 = _rows_of(x_ptr, row + 1, end, left, stride, TILE)
    x_2 = _rows_of(x_ptr, row + 2, end, left, stride, TILE)
    x_3 = _rows_of(x_ptr, row + 3, end, left, stride, TILE)
    where = row_values_ptr, columns, end, left
    scale_0 = _store_rows(x_0, row, *where, POWER_OF_TWO, TILE)
    scale_1 = _store_rows(x_1, row + 1, *where, POWER_OF_TWO, TILE)
    scale_2 = _store_rows(x_2, row + 2, *where, POWER_OF_TWO, TILE)
    scale_3 = _store_rows(x_3, row + 3, *where, POWER_OF_TWO, TILE)
    scale = tl.reshape(tl.join(tl.join(scale_0, scale_2), tl.join(scale_1, scale_3)), (TILE,))
    at = (start + within).to(tl.int64) * row_scale_stride + column_tile.to(tl.int64) * row_tile_stride
    tl.store(row_scale_ptr + at, scale, mask=start + within < end)
    # the rows past the last expert belong to nobody: in columns they are zeros
    owned = expert < experts
    amax = tl.maximum(tl.maximum(tl.abs(x_0), tl.abs(x_1)), tl.maximum(tl.abs(x_2), tl.abs(x_3)))
    scale = tile_scale(tl.where(owned, tl.max(amax, axis=0), 0.0), POWER_OF_TWO)
    word = _bytes(x_0, scale) | (_bytes(x_1, scale) << 8)
    word |= (_bytes(x_2, scale) << 16) | (_bytes(x_3, scale) << 24)
    words = tl.trans(tl.where(owned, word, 0))
    kept, place = column < tl.where(tile < word_dim // (TILE // 4), columns, 0), column.to(tl.int64)
    at = place[:, None] * word_dim + tile * (TILE // 4) + tl.arange(0, TILE // 4)[None, :]
    tl.store(column_words_ptr + at, words, mask=kept[:, None])
    at = place * column_scale_stride + tile.to(tl.int64) * column_tile_stride
    tl.store(column_scale_ptr + at, scale, mask=kept)


def clock(call, operands, repeats=20):
    """Median microseconds over rotating operands."""
    for operand in operands:
        call(*operand)
    if DRY:
        return 1.0
    rotation = itertools.cycle(operands)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(40_000_000)
    for start, end in pairs:
        operand = next(rotation)
        start.record()
        call(*operand)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in pairs)


def random(*shape, seed=0, dtype=DTYPE):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def sets(make, size):
    """Operand sets that together exceed the L2 by far."""
    return [make(seed) for seed in range(1 if DRY else max(1, -(-(300 << 20) // size)))]


def line(what, name, us, moved, note=""):
    print(f"{what:34} {name:28} {us:8.1f} us {moved / us / 1e6:5.2f} TB/s {moved / us / 1e6 / ROOF:5.2f} of copy  {note}", flush=True)


def as_bytes(x):
    return x.reshape(-1).view(torch.uint8)


def compare(what, variants, make, size, moved, exact=None, tolerance=4e-3):
    """`variants` are (name, call) whose outputs are lists of tensors; the first is the old kernel."""
    operands, first = sets(make, size), None
    for name, call in variants:
        try:
            out = [x.clone() for x in call(*operands[0])]
            first = out if first is None else first
            differs = sum(int((as_bytes(a) != as_bytes(b)).sum()) for a, b in zip(out, first))
            note = "same bits" if not differs else f"{differs} BYTES DIFFER"
            if exact is not None:
                errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(out, exact(*operands[0]))]
                note += f", errors {' '.join(f'{e:.1e}' for e in errors)}{'' if max(errors) < tolerance else ' WRONG'}"
            line(what, name, clock(call, operands), moved, note)
        except Exception as error:  # one variant that fails leaves the others
            print(f"{what:34} {name:28} {type(error).__name__} {str(error)[:200]}", flush=True)


def sums(tokens, width, top_k, present, what):
    """Sums of a token's copies and their gradients; `present` of all copies have rows."""
    here = torch.rand(tokens, top_k, device=DEVICE) < present
    place = torch.randperm(int(here.sum()), device=DEVICE)
    row_TK = torch.full((tokens, top_k), -1, dtype=torch.int64, device=DEVICE)
    row_TK[here] = place
    rows, padded = len(place), triton.next_power_of_2(width)
    weight = torch.rand(tokens, top_k, device=DEVICE)
    sizes = width, width
    out, old_warps = torch.empty(tokens, width, dtype=DTYPE, device=DEVICE), min(16, max(1, padded // 512))

    def old(x):
        old_sum_rows[(tokens,)](x, weight, row_TK, out, out, out, *sizes, WEIGHTED=True, BESIDE=0, TOP_K=top_k,
                                WIDTH=padded, num_warps=old_warps)
        return [out]

    def new(few, part, warps):
        def call(x):
            moves._sum_rows[(tokens * triton.cdiv(width, part),)](
                x, weight, row_TK, out, out, out, *sizes, WEIGHTED=True, BESIDE=0, TOP_K=top_k, FEW=few,
                WIDTH=part, PDL=False, num_warps=warps)
            return [out]
        return call

    def exact(x):
        total = torch.zeros(tokens, width, dtype=torch.float64, device=DEVICE)
        for k in range(top_k):
            total += torch.where(row_TK[:, k : k + 1] >= 0, x[row_TK[:, k].clamp(min=0)].double() * weight[:, k : k + 1], 0)
        return [total]

    part = min(1024, padded)
    variants = [("old", old)]
    for few, size, warps in ((False, part, 2), (True, part, 2), (False, part, 4), (True, part, 4), (False, min(2048, padded), 4), (True, min(2048, padded), 4)):
        variants.append((f"{'few' if few else 'all at once'}, {size} by {warps} warps", new(few, size, warps)))
    make = lambda seed: (random(rows, width, seed=seed),)
    row = width * ITEM
    compare(f"sum {what}", variants, make, rows * row, row * (rows + tokens), exact)

    dout, drows, dweight = random(tokens, width, seed=9), torch.zeros(rows, width, dtype=DTYPE, device=DEVICE), torch.empty_like(weight)

    def backward(kernel, warps):
        def call(x):
            kernel[(tokens,)](x, weight, row_TK, dout, drows, dweight, *sizes, TOP_K=top_k, WIDTH=padded, num_warps=warps)
            return [drows, dweight]
        return call

    def gradients(x):
        drow, dweights = torch.zeros(rows, width, dtype=torch.float64, device=DEVICE), []
        for k in range(top_k):
            at, kept = row_TK[:, k].clamp(min=0), row_TK[:, k] >= 0
            drow[at[kept]] = (weight[:, k : k + 1].double() * dout.double())[kept]
            dweights.append(torch.where(kept, (x[at].double() * dout.double()).sum(1), 0))
        return [drow, torch.stack(dweights, 1)]

    variants = [("old", backward(old_sum_rows_backward, old_warps))]
    variants += [(f"in turn, {warps} warps", backward(moves._sum_rows_backward, warps)) for warps in (old_warps, max(1, old_warps // 2), min(16, 2 * old_warps))]
    compare(f"sum backward {what}", variants, make, rows * row, row * (2 * rows + tokens), gradients)


def both(rows, width, experts, what):
    """E4M3 row and column tiles at once."""
    ends = None if experts == 0 else ((torch.arange(1, experts + 1, device=DEVICE) * rows) // experts).to(torch.int32)
    padded = padded_rows(rows, max(1, experts))

    def run(kernel, warps, **more):
        def call(x):
            made = [fused._empty_tiles(rows, width, DEVICE), fused._empty_tiles(width, padded, DEVICE)]
            by_row, by_column = made
            kernel[(padded // TILE + 1, by_row.scale.shape[1])](
                x, *by_row, by_column.values.view(torch.int32), by_column.scale, x if ends is None else ends,
                rows, max(1, experts), width, padded // 4, x.stride(0), *by_row.scale.stride(), *by_column.scale.stride(),
                POWER_OF_TWO=False, EXPERTS=groups(ends), TILE=TILE, num_warps=warps, **more)
            return [*by_row, *by_column]
        return call

    variants = [("old", run(old_quantise_both, 4))]
    variants += [(f"quarters, {warps} warps, {stages} stages", run(fused._quantise_both, warps, STAGES=stages)) for warps, stages in ((4, 1), (4, 2), (4, 3), (8, 2))]
    compare(f"quantise both {what}", variants, lambda seed: (3 * random(rows, width, seed=seed),), rows * width * ITEM, rows * width * (ITEM + 2))


def permutation(tokens, width, top_k, what):
    """What of `permute` is sorting."""
    expert = torch.rand(tokens, 64, device=DEVICE).topk(top_k).indices.to(torch.int32)
    operands, row = sets(lambda seed: (random(tokens, width, seed=seed),), tokens * width * ITEM), width * ITEM * tokens
    line(f"permute {what}", "with sort", clock(lambda x: moves.permute(x, expert, 64), operands), row * (top_k + 1))
    _, maps = moves.row_maps(expert, 64)
    line(f"permute {what}", "rows alone", clock(lambda x: moves._Gather.apply(x, maps.row_TK), operands), row * (top_k + 1))
    print(f"{'':34} {'sort alone':28} {clock(lambda: moves.row_maps(expert, 64), [()]):8.1f} us", flush=True)


def norm(rows, width):
    """Where a norm that quantises is behind: with and without the sum before it."""
    weight, operands = random(width, seed=5), sets(lambda seed: (random(rows, width, seed=seed),), rows * width * ITEM)
    us = clock(lambda x: fused.rms_norm(x, weight, 1e-6, power_of_two=False), operands)
    line(f"rms_norm_fp8 {rows} x {width}", "as it is", us, rows * width * (ITEM + 1))


torch.manual_seed(0)
big = 1 << (14 if DRY else 29)
source, target = random(big), torch.empty(big, dtype=DTYPE, device=DEVICE)
ROOF = 1.0
ROOF = 2 * source.numel() * ITEM / clock(lambda: target.copy_(source), [()]) / 1e6
print(f"copy {ROOF:.2f} TB/s", flush=True)
del source, target
if DRY:
    sums(9, 1100, 8, 0.2, "V3, a rank of 8")
    sums(5, 96, 3, 1.0, "dense")
    both(300, 150, 2, "grouped")
    both(256, 128, 0, "dense")
    permutation(9, 44, 3, "small")
    norm(5, 300)
else:
    sums(16384, 7168, 8, 1.5 / 8, "V3, 1.5 of 8 here")
    sums(16384, 7168, 8, 1.0, "V3, all here")
    sums(16384, 2048, 6, 1.0, "Moonlight, all here")
    sums(65536, 2048, 6, 1.2 / 6, "65536 x 2048, 1.2 of 6 here")
    both(32768, 7168, 8, "32768 x 7168 of 8")
    both(98304, 2048, 64, "98304 x 2048 of 64")
    both(16384, 7168, 0, "16384 x 7168")
    permutation(16384, 7168, 8, "V3")
    permutation(16384, 2048, 6, "Moonlight")
    norm(32768, 7168)
print(f"{time.time() - T0:.0f} s")
