"""MLA decode, new beside main's (drafts/old_*.py). PYTHONPATH=src python drafts/run_mla.py [bits|times]

Compiles in processes side by side, then: bits against main's kernels (blocks of others and what lies behind
contexts are NaN, memory for outputs is NaN before), 20 repeats, float64; then microseconds a call in CUDA
graphs over rotating blocks of a large cache, medians of 9 in turns: old, new, new not launched early.
"""

import importlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from benthic.kernels import launch, ops

DEVICE, SCALE, TOKEN = "cuda", 192**-0.5, 576 * 2
FORMS = [  # name, module, FP8, queries, heads
    ("bf16 1x16", "gluon_mla", False, 1, 16),
    ("bf16 2x16", "gluon_mla", False, 2, 16),
    ("fp8 1x16", "gluon_mla_fp8", True, 1, 16),
    ("fp8 2x16", "gluon_mla_fp8", True, 2, 16),
    ("wide 4x16", "gluon_mla_wide", False, 4, 16),
    ("wide 1x64", "gluon_mla_wide", False, 1, 64),
    ("wide 2x64", "gluon_mla_wide", False, 2, 64),
    ("wide 1x128", "gluon_mla_wide", False, 1, 128),
    ("wide 4x128", "gluon_mla_wide", False, 4, 128),
]
RAGGED = [1, 63, 64, 65, 1000, 8192]
BITS = [RAGGED, *([each] for each in RAGGED), list(range(961, 1025)), [0, 8192, 0, 1, 700], [1030] * 200]
TIMES = [(1, 1024), (8, 1024), (64, 1024), (64, 1050), (256, 1024), (256, 1050), (256, 2048), (64, 4096), (256, 8192)]
FP8_TIMES = [(64, 1050), (256, 1050)]
FAILED = []


def kernel(name, old):
    return importlib.import_module(f"old_{name}" if old else f"benthic.kernels.{name}").mla_decode


def operands(contexts, queries, heads, fp8, seed=0):
    """Queries, and contexts in blocks in random order; what belongs to no context is NaN."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    blocks = [-(-c // 64) for c in contexts]
    order = torch.randperm(sum(blocks) + 3, generator=g, device=DEVICE)
    cache = torch.full((sum(blocks) + 3, 64, 576), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    table = torch.full((len(contexts), max(blocks) // 16 * 16 + 16), 2**30, dtype=torch.int32, device=DEVICE)
    for row, (context, own) in enumerate(zip(contexts, order[: sum(blocks)].split(blocks), strict=True)):
        table[row, : len(own)] = own.int()
        tokens = torch.full((len(own) * 64, 576), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        tokens[:context] = torch.randn(context, 576, generator=g, device=DEVICE).bfloat16()
        cache[own] = tokens.view(-1, 64, 576)
    cache = cache.to(torch.float8_e4m3fn) if fp8 else cache
    q = torch.randn(len(contexts), queries, heads, 576, generator=g, device=DEVICE).bfloat16()
    return q[..., :512].contiguous(), q[..., 512:].contiguous(), cache, table, torch.tensor(contexts, device=DEVICE).int()


def call(decode, args):
    """With NaN where outputs and parts will lie: the allocator gives freed blocks out again."""
    poison = [torch.full((n,), torch.nan, device=DEVICE) for n in (args[0].numel() // 2, 2 * 132 * 32 * 512)]
    del poison
    return decode(*args, scale=SCALE)


def check(form, contexts, repeats=20):
    _name, module, fp8, queries, heads = form
    args = operands(contexts, queries, heads, fp8)
    exact = call(kernel(module, old=True), args)
    new = kernel(module, old=False)
    good = all(torch.equal(call(new, args).view(torch.int16), exact.view(torch.int16)) for _ in range(repeats))
    with launch.in_turn():
        good &= torch.equal(call(new, args).view(torch.int16), exact.view(torch.int16))
    good &= bool(torch.isfinite(exact).all())
    if sum(contexts) < 10_000:
        latent, rope, cache, *where = args
        truth = ops.mla_decode(latent.double(), rope.double(), cache.double(), *where, scale=SCALE, impl="reference")
        norm = truth.flatten(2).norm(dim=-1)
        good &= bool(((exact.double() - truth).flatten(2).norm(dim=-1) <= 1e-2 * norm).all())
    return good


def graphs_like(module):
    """Contexts that change between replays: the graph holds launches that follow from shapes alone."""
    args = operands([300, 64, 2000, 129], 1, 16, module.endswith("fp8"))
    new, old, context = kernel(module, old=False), kernel(module, old=True), args[-1]
    new(*args, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = new(*args, scale=SCALE)
    good = True
    for less in (0, 1, 15, 16, 63, 64):
        context -= less
        context.clamp_(min=0)
        for _ in range(5):
            graph.replay()
            good &= torch.equal(out, old(*args, scale=SCALE))
    return good


def warm(index):
    """Compile what one form needs, old and new."""
    name, module, fp8, queries, heads = FORMS[index // 2]
    for contexts in (*BITS, [1024], [1024] * 8, [1024] * 64):
        args = operands(contexts, queries, heads, fp8)
        kernel(module, old=index % 2 == 1)(*args, scale=SCALE)
        if index % 2 == 0 and module != "gluon_mla_wide":
            with launch.in_turn():
                kernel(module, old=False)(*args, scale=SCALE)
    torch.cuda.synchronize()


def bits():
    for form in FORMS:
        bad = [contexts for contexts in BITS if not check(form, contexts)]
        FAILED.extend(bad)
        print(f"{'BAD' if bad else 'ok '} {form[0]} {[(len(c), c[:6]) for c in bad]}", flush=True)
    for module in ("gluon_mla", "gluon_mla_fp8"):
        good = graphs_like(module)
        FAILED.extend([] if good else [module])
        print(f"{'ok ' if good else 'BAD'} graph {module}", flush=True)


def recorded(decode, calls):
    decode(*calls[0], scale=SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in calls:
            decode(*args, scale=SCALE)
    graph.replay()
    return graph


def timed(graph, launches):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / launches


def times(module, sizes, cache):
    pages, g = len(cache), torch.Generator(DEVICE).manual_seed(1)
    token = 576 * cache.element_size()
    for sequences, context in sizes:
        blocks = -(-context // 64)
        launches = min(200, max(20, -(-400_000_000 // (sequences * blocks * 64 * token))))
        q = torch.randn(sequences, 1, 16, 576, generator=g, device=DEVICE).bfloat16()
        latent, rope = q[..., :512].contiguous(), q[..., 512:].contiguous()
        many, calls, at = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE), [], pages
        for _ in range(launches):
            if at + sequences * blocks > pages:
                order, at = torch.randperm(pages, generator=g, device=DEVICE).int(), 0
            table = torch.zeros(sequences, blocks // 16 * 16 + 16, dtype=torch.int32, device=DEVICE)
            table[:, :blocks] = order[at : at + sequences * blocks].view(sequences, blocks)
            at += sequences * blocks
            calls.append((latent, rope, cache, table, many))
        ways = [recorded(kernel(module, old=old), calls) for old in (True, False)]
        with launch.in_turn():
            ways.append(recorded(kernel(module, old=False), calls))
        found = [[] for _ in ways]
        for _ in range(9):
            for way, own in zip(ways, found, strict=True):
                own.append(timed(way, launches))
        us = [statistics.median(own) for own in found]
        rates = [sequences * context * token / each / 1e6 for each in us]
        texts = [f"{each:7.2f} ({rate:.2f})" for each, rate in zip(us, rates, strict=True)]
        print(f"{module} {sequences}x{context}: old {texts[0]} new {texts[1]} in turn {texts[2]} us (TB/s)", flush=True)


def main():
    begun, what = time.time(), sys.argv[1] if len(sys.argv) > 1 else "all"
    if what == "warm":
        return warm(int(sys.argv[2]))
    jobs = [subprocess.Popen([sys.executable, __file__, "warm", str(i)]) for i in range(2 * len(FORMS))]
    codes = [job.wait() for job in jobs]
    print(f"compiled {time.time() - begun:.0f} s {codes}", flush=True)
    if what in ("all", "bits"):
        bits()
        print(f"bits {time.time() - begun:.0f} s", flush=True)
    if what in ("all", "times"):
        cache = torch.empty(65536, 64, 576, dtype=torch.bfloat16, device=DEVICE).normal_()
        times("gluon_mla", TIMES, cache)
        times("gluon_mla_fp8", FP8_TIMES, cache[:40000].to(torch.float8_e4m3fn))
    print(f"{time.time() - begun:.0f} s, {'FAILED ' + str(len(FAILED)) if FAILED else 'all equal'}", flush=True)
    return len(FAILED)


if __name__ == "__main__":
    sys.exit(main())
