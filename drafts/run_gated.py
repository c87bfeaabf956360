"""SwiGLU in the product of few rows (`ops.grouped_swiglu(impl="few_rows")`): values, bits, times on a GPU.

python drafts/run_gated.py           Moonlight's sizes on a GPU, about 40 s
TRITON_INTERPRET=1 python drafts/run_gated.py --cpu    small sizes, interpreted, nothing timed
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from benthic.kernels import ops

CPU = "--cpu" in sys.argv
DEVICE, DTYPE = ("cpu", torch.float32) if CPU else ("cuda", torch.bfloat16)
EXPERTS, TOP_K, DIM, WIDTH, LAYERS = (16, 3, 72, 40, 2) if CPU else (64, 6, 2048, 1408, 26)
# decode rows; the last has more than 32 rows an expert, so there the table takes two ops
FEW = (1, 3, 8, 64) if CPU else (1, 3, 8, 32, 64, 128, 256, 340)
MANY = 300 if CPU else 512
REPEATS, TIMED = (2, 1) if CPU else (20, 15)


def routed(tokens, seed):
    """Rows sorted by expert, each token at TOP_K different experts: rows and ends."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    ends = choice.flatten().bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
    x = torch.randn(tokens, DIM, generator=generator)[choice.flatten().argsort(stable=True) // TOP_K]
    return x.to(DEVICE, DTYPE), ends.to(DEVICE)


def two(x, weight, ends):
    return ops.swiglu(ops.grouped_linear(x, weight, ends, impl="few_rows"), impl="triton")


def fused(x, weight, ends):
    return ops.grouped_swiglu(x, weight, ends, impl="few_rows")


def weights(*shape, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(EXPERTS, *shape, generator=generator, device=DEVICE, dtype=DTYPE).mul_(0.02)


def poison(on):
    torch._C._set_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on
    if on:
        assert torch.empty(3, device=DEVICE).isnan().all()


def checked(tokens, weight, exact_weight):
    """One line: bits as of the two ops, values as of the definition, the same again and again."""
    x, ends = routed(tokens, tokens)
    spare = torch.full((3, DIM), torch.nan, device=DEVICE, dtype=DTYPE)  # rows of nobody
    verdicts = []
    for rows in (x, torch.cat([x, spare])):
        if len(rows) > 32 * EXPERTS:
            continue
        found, wanted = fused(rows, weight, ends), two(rows, weight, ends)
        verdicts.append(torch.equal(found, wanted) and bool(found.isfinite().all()))
        verdicts += [torch.equal(fused(rows, weight, ends), found) for _ in range(REPEATS)]
    part = len(x) // 2  # the same rows with fewer beside them
    half = fused(x[:part], weight, ends.clamp(max=part))
    beside = torch.equal(half, fused(x, weight, ends)[:part])
    exact = ops.grouped_swiglu(x.double(), exact_weight, ends, impl="reference")
    error = float((fused(x, weight, ends).double() - exact).norm() / exact.norm())
    good = all(verdicts) and beside and error < 1e-2
    print(f"{tokens:4} rows: bits {all(verdicts)}, neighbours {beside}, error {error:.1e}"
          f"{'' if good else '  <<<<<<<< WRONG'}", flush=True)  # fmt: skip
    return good


def chain(gated, operands, ups, downs):
    def run():
        for (x, ends), up, down in zip(operands, ups, downs, strict=True):
            hidden = gated(x, up, ends)
            if down is not None:
                ops.grouped_linear(hidden, down, ends, impl="few_rows")

    return run


def recorded(run):
    if CPU:
        run()
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(run):
    if CPU:
        run()
        return 1.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def timed(tokens, ups, downs):
    """Times of a graph of all layers a layer: the pair of ops, then fused; alone and with the product after it."""
    operands = [routed(tokens, 1000 * tokens + layer) for layer in range(LAYERS)]
    read = sum(int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum()) for _, ends in operands) / LAYERS
    runs = [
        recorded(chain(gated, operands, ups, after))
        for after in ([None] * LAYERS, downs)
        for gated in (two, fused)
    ]
    times = [[] for _ in runs]
    for turn in range(TIMED + 2):
        for run, into in zip(runs, times, strict=True):
            taken = microseconds(run)
            if turn >= min(2, TIMED):
                into.append(taken / LAYERS)
    a, b, c, d = (statistics.median(each) for each in times)
    speed = [read * 2 * WIDTH * DIM * DTYPE.itemsize / 1e6 / each for each in (a, b)]
    print(f"{tokens:4} rows ({read:4.1f} experts): two {a:6.1f} us {speed[0]:.2f} TB/s, fused {b:6.1f}"
          f" {speed[1]:.2f}, saved {a - b:+5.2f}; with down {c:6.1f}, {d:6.1f}, saved {c - d:+5.2f}",
          flush=True)  # fmt: skip


@torch.inference_mode()
def main():
    begun = time.perf_counter()
    if "compile" in sys.argv:
        tokens = int(sys.argv[-1])
        (x, ends), weight, down = (
            routed(tokens, tokens),
            weights(2 * WIDTH, DIM, seed=0),
            weights(DIM, WIDTH, seed=1),
        )
        for rows in (x, torch.cat([x, x[:3]])[: 32 * EXPERTS], x[: len(x) // 2]):
            fused(rows, weight, ends.clamp(max=len(rows)))
            two(rows, weight, ends.clamp(max=len(rows)))
        ops.grouped_linear(fused(x, weight, ends), down, ends, impl="few_rows")
        return 0
    if not CPU:
        others = [subprocess.Popen([sys.executable, __file__, "compile", str(n)]) for n in FEW]
        assert not any(each.wait() for each in others), "a form does not compile"
        print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    ups = [weights(2 * WIDTH, DIM, seed=layer) for layer in range(LAYERS)]
    downs = [weights(DIM, WIDTH, seed=100 + layer) for layer in range(LAYERS)]
    exact_weight = ups[0].double()
    poison(True)
    good = [checked(tokens, ups[0], exact_weight) for tokens in FEW]
    x, ends = routed(MANY, 7)
    try:
        fused(x, ups[0], ends)
        good.append(False)
        print("few rows were not refused  <<<<<<<< WRONG")
    except Exception as error:
        print(f"{MANY:4} rows: {type(error).__name__}, as wanted")
    plain = ops.grouped_swiglu(x, ups[0], ends)
    good.append(torch.equal(plain, ops.swiglu(ops.grouped_linear(x, ups[0], ends))))
    print(f"{MANY:4} rows, as the table chooses: bits {good[-1]}")
    poison(False)
    del exact_weight
    for tokens in FEW:
        timed(tokens, ups, downs)
    print(f"{'all right' if all(good) else 'WRONG'}, {time.perf_counter() - begun:.0f} s")
    return not all(good)


if __name__ == "__main__":
    sys.exit(main())
