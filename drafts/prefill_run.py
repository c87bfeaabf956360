"""Checks and times of the prefill branch on one H200: PYTHONPATH=src python prefill_run.py [--dry] [parts...]

Parts: lists, rope, parts, shared, model (in this order; all by default). --dry: on a CPU, tiny, for typos.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time

import torch

DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
GLUON, TRITON = (None, None) if DRY else ("gluon", "triton")
BF16 = torch.bfloat16
BEGAN = time.perf_counter()

from benthic.kernels import ops  # noqa: E402
from benthic.kernels.tile_lists import TileLists  # noqa: E402


def say(*words):
    print(f"[{time.perf_counter() - BEGAN:5.1f} s]", *words, flush=True)


def made(*shape, seed=0, dtype=BF16):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def starts_of(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def equal(name, ours, theirs):
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    say("same bits" if same else "DIFFERENT BITS", name)
    return same


def median_us(runs, repeats=30, inner=1):
    """Median microseconds of calls that take turns over several sets of operands, larger than the L2 cache."""
    if DRY:
        for run in runs:
            run()
        return float("nan")
    for run in runs:
        run()
    torch.cuda.synchronize()
    times = []
    for turn in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # the host is ahead
        begin.record()
        for i in range(inner):
            runs[(turn * inner + i) % len(runs)]()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / inner)
    return statistics.median(times)


def graph_of(run):
    """A replay of what `run` launches."""
    if DRY:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- lists ------------------------------------------------------------------------------------------------


def lists():
    sizes = (1000, 3, 129, 640) if not DRY else (10, 3)
    tokens, starts = sum(sizes), starts_of(sizes)
    settings = {"max_seqlen_q": max(sizes), "max_seqlen_k": max(sizes), "scale": 192**-0.5}

    def layers(shared, count=3):
        found = []
        for layer in range(count):
            leaves = [made(tokens, 4, w, seed=layer).requires_grad_() for w in (192, 192, 128)]
            out = ops.attention(*leaves, starts, starts, **settings, lists=shared, impl=GLUON)
            found += [out.detach(), *torch.autograd.grad(out, leaves, made(tokens, 4, 128, seed=9))]
        return found

    equal("attention and gradients of three layers that share lists, beside layers with their own",
          layers(TileLists()), layers(None))

    # a recorded step of 27 layers whose bounds change between replays
    rows = 512 if not DRY else 16
    q, k, v = (made(rows, 16, w) for w in (192, 192, 128))
    bounds = torch.full((35,), rows, dtype=torch.int32, device=DEVICE)
    bounds[0] = 0
    longest = {"max_seqlen_q": rows, "max_seqlen_k": rows, "scale": 192**-0.5}
    results = {}

    def step(name, shared, count=27):
        with torch.no_grad():
            one = TileLists() if shared else None
            for _ in range(count):
                out = ops.attention(q, k, v, bounds, bounds, **longest, lists=one, impl=GLUON)
            results[name] = out

    if DRY:
        step("own", False), step("shared", True)
        return
    replays = {name: graph_of(functools.partial(step, name, shared)) for name, shared in
               (("own", False), ("shared", True))}
    for ends in ((512,), (100, 300, 301, 512), (0, 7, 512)):
        bounds.fill_(rows)[0] = 0
        bounds[1 : 1 + len(ends)] = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        for replay in replays.values():
            replay()
        torch.cuda.synchronize()
        recorded = [results["own"].clone(), results["shared"].clone()]
        step("eager", False, 1)
        equal(f"a recorded step, bounds {ends}", recorded, [results["eager"]] * 2)
    own, shared = (median_us([replays[name]]) for name in ("own", "shared"))
    say(f"27 attentions of 512 rows in a graph: lists of their own {own:.1f} us, shared {shared:.1f} us, "
        f"{(own - shared) / 26:.2f} us a list")


# --- rope -------------------------------------------------------------------------------------------------

if not DRY:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["rows"])
    def _rotate_before(
        x_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, half, stride_t, stride_h, sign,
        ROWS: tl.constexpr, HALF: tl.constexpr,
    ):
        """As it was at 8c256b9."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token, head = row // heads, row % heads
        column = tl.arange(0, HALF)
        mask = (row < rows)[:, None] & (column < half)[None, :]
        angle = token[:, None] * half + column[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0) * sign
        place = (token * stride_t + head * stride_h)[:, None] + column[None, :]
        x_1 = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(x_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
        place = row[:, None] * (2 * half) + column[None, :]
        tl.store(out_ptr + place, (x_1 * cos - x_2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + place + half, (x_2 * cos + x_1 * sin).to(out_ptr.dtype.element_ty), mask=mask)


def rotated_before(x, cos, sin, sign=1.0):
    if DRY:
        return ops.rope(x, cos, sin * sign)
    heads = x.shape[1] if x.dim() == 3 else 1
    rows, half = x.shape[0] * heads, x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    padded = 1 << (half - 1).bit_length()
    block = max(1, 2048 // padded)
    _rotate_before[(-(-rows // block),)](
        x, cos, sin, out, rows, heads, half, x.stride(0), x.stride(1) if x.dim() == 3 else 0, sign,
        ROWS=block, HALF=padded, num_warps=min(16, max(4, block * padded // 1024)),
    )
    return out


def rope():
    for tokens, heads, width in ((1, 16, 64), (4097, 16, 64), (333, 7, 12)):
        angle = made(tokens, width // 2, seed=3, dtype=torch.float32) * 100
        cos, sin = angle.cos(), angle.sin()
        q, kv = made(tokens, heads, 128 + width), made(tokens, 512 + width, seed=1)
        query, key = q[..., 128:].detach().requires_grad_(), kv[:, 512:].detach().requires_grad_()
        outs = ops.rope_both(query, key, cos, sin, impl=TRITON)
        dq, dk = made(tokens, heads, 192)[..., :width], made(tokens, width, seed=5)
        grads = torch.autograd.grad(outs, (query, key), (dq, dk))
        before = [rotated_before(x.detach(), cos, sin) for x in (query, key)]
        before += [rotated_before(x, cos, sin, -1.0) for x in (dq, dk)]
        equal(f"rotation of both and its gradients, {tokens} x {heads} x {width}", [*outs, *grads], before)
        for given, found in ((0, dq), (1, dk)):
            outs = ops.rope_both(query, key, cos, sin, impl=TRITON)
            (one,) = torch.autograd.grad(outs[given], (query, key)[given], found)
            equal(f"  gradient of {'query key'.split()[given]} alone", [one], [before[2 + given]])
        exact = ops.rope(query.detach().double(), cos.double(), sin.double(), impl="reference")
        error = (outs[0].double() - exact).norm() / exact.norm()
        say(f"  off the definition by {error:.1e} (bfloat16: 2e-3)")
    for tokens in (4096, 16384) if not DRY else (64,):
        sets = []
        for seed in range(4):
            q, kv = made(tokens, 16, 192, seed=seed), made(tokens, 576, seed=seed)
            angle = made(tokens, 32, dtype=torch.float32)
            sets.append((q[..., 128:], kv[:, 512:], angle.cos(), angle.sin()))

        def both(q, k, cos, sin):
            with torch.no_grad():
                ops.rope_both(q, k, cos, sin, impl=TRITON)

        def apart(q, k, cos, sin):
            with torch.no_grad():
                ops.rope(q, cos, sin, impl=TRITON), ops.rope(k, cos, sin, impl=TRITON)

        old, new = (median_us([functools.partial(run, *each) for each in sets]) for run in (apart, both))
        say(f"rotation of {tokens} rows: two kernels {old:.1f} us, one {new:.1f} us")


# --- parts ------------------------------------------------------------------------------------------------


def parted(rows, context, heads, seed=0):
    q, kv = made(rows, heads, 192, seed=seed), made(context, heads, 256, seed=seed + 1)
    rotated, latents = made(rows, heads, 64, seed=seed + 2), made(context, 576, seed=seed + 3)
    return q[..., :128], rotated, kv[..., :128], latents[:, 512:], kv[..., 128:]


def parts():
    packs = {
        "packs": ((1000, 3, 129, 640), None),
        "chunks": ((1, 300, 64), (700, 301, 65)),
        "blind": ((256, 0, 5), (128, 40, 0)),
        "no keys": ((5,), (0,)),
        "equal": ((256, 256), None),
    }
    for name, (queries, keys) in packs.items():
        keys = keys or queries
        operands = parted(sum(queries), sum(keys), 16)
        lengths = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys), "scale": 192**-0.5}
        bounds = starts_of(queries), starts_of(keys)
        run = functools.partial(ops.attention_of_parts, *operands, *bounds, **lengths)
        with torch.no_grad():
            equal(f"parts beside joined, {name}", [run(impl=GLUON)], [run(impl="joined")])
            exact = ops.attention_of_parts(
                *(x.double() for x in operands), *bounds, **lengths, impl="reference")
            error = (run(impl=GLUON).double() - exact).norm() / exact.norm().clamp(min=1e-9)
        say(f"  off the definition by {error:.1e} (1e-2 allowed)")
    for count, length in ((4, 4096), (1, 4096), (1, 2048)) if not DRY else ((2, 32),):
        tokens = count * length
        sets, starts = [parted(tokens, tokens, 16, seed) for seed in range(2)], starts_of((length,) * count)
        lengths = {"max_seqlen_q": length, "max_seqlen_k": length, "scale": 192**-0.5}

        def run(impl, operands, starts=starts, lengths=lengths):
            with torch.no_grad():
                ops.attention_of_parts(*operands, starts, starts, **lengths, impl=impl)

        old, new = (
            median_us([functools.partial(run, impl, each) for each in sets], 20) for impl in ("joined", GLUON)
        )
        pairs = count * 16 * length * (length + 1) / 2
        flops = 2 * pairs * 320
        alone = "" if DRY else f"; {flops / new / 1e6:.0f} TFLOP/s with parts"
        say(f"attention of {count} x {length}: joined {old:.1f} us, parts {new:.1f} us, "
            f"{(old - new) * 27 / 1e3:.2f} ms of 27 layers{alone}")


# --- shared experts: what one product with SwiGLU inside would give ----------------------------------------


def shared():
    tokens, width, hidden = (16384, 2816, 2048) if not DRY else (64, 128, 64)
    weight = made(2 * width, hidden) * 0.02
    sets = [made(tokens, hidden, seed=seed) for seed in range(3)]
    ends = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)

    def two(x):
        return ops.swiglu(torch.nn.functional.linear(x, weight))

    def one(x):
        return ops.grouped_swiglu(x, weight.unsqueeze(0), ends, impl=GLUON)

    with torch.no_grad():
        equal("shared experts: library product and SwiGLU beside our product with SwiGLU inside",
              [two(sets[0])], [one(sets[0])])
        error = (two(sets[0]).double() - one(sets[0]).double()).norm() / two(sets[0]).double().norm()
        times = [
            median_us([functools.partial(run, x) for x in sets])
            for run in (lambda x: torch.nn.functional.linear(x, weight), two, one)
        ]
    say(f"  differ by {error:.1e}; product alone {times[0]:.1f} us, then SwiGLU {times[1]:.1f} us, "
        f"inside {times[2]:.1f} us: {(times[1] - times[2]) * 26 / 1e3:.2f} ms of 26 layers")


# --- the whole step ---------------------------------------------------------------------------------------


def model():
    from dataclasses import replace

    from benthic.model.dummy import random_weights
    from benthic.model.local import LocalExchange
    from benthic.model.sockets import Sockets
    from benthic.serve import attend
    from benthic.serve.cache import CacheLayout, LatentCache
    from benthic.serve.few_rows import FewRowsLinear
    from benthic.spec import presets

    config, dtype = presets.get("moonlight-16b-a3b"), BF16
    count, length = 4, 4096
    if DRY:
        config = replace(presets.get("nano"), q_lora_rank=None, num_nextn_predict_layers=0)
        count, length, dtype = 2, 16, torch.float32
    network = random_weights(config, torch.device(DEVICE), dtype, seed=0)
    say("weights made")
    tokens = count * length
    bounds = starts_of((length,) * count)
    layout = CacheLayout.of(config, block_size=64, dtype=dtype)
    cache = LatentCache(layout, tokens // 64 + 1, torch.device(DEVICE))
    ids = torch.randint(0, config.vocab_size, (tokens,), device=DEVICE)
    positions = torch.arange(length, device=DEVICE).repeat(count)
    slots = torch.arange(tokens, device=DEVICE)
    linear = FewRowsLinear()  # as a server on a GPU multiplies

    @torch.inference_mode()
    def step():
        prefill = attend.PrefillRows(bounds, bounds, length, length, None)
        socket = attend.PagedAttend(cache, attend.StepLayout(slots, None, prefill))
        sockets = Sockets(socket, LocalExchange(config.n_routed_experts), linear)
        return network(ids, positions, sockets).hidden_TD

    parts_of = attend.attention_of_parts
    joined = functools.partial(parts_of, impl="joined")
    found = {}
    for name, core in (("joined", joined), ("parts", parts_of)):
        attend.attention_of_parts = core
        found[name] = step().clone()
    equal("the whole step, joined beside parts", [found["joined"]], [found["parts"]])
    times = {"joined": [], "parts": []}
    for turn in range(14 if not DRY else 2):
        name, core = (("joined", joined), ("parts", parts_of))[turn % 2]
        attend.attention_of_parts = core
        if DRY:
            step()
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        step()
        end.record()
        launched = time.perf_counter() - began
        end.synchronize()
        times[name].append(begin.elapsed_time(end))
    attend.attention_of_parts = parts_of
    if DRY:
        return
    for name, each in times.items():
        say(f"step of {count} x {length} tokens, {name}: {statistics.median(each[1:]):.2f} ms "
            f"(all {' '.join(f'{x:.1f}' for x in each)}); the host was done after {launched * 1e3:.1f} ms")
    profile(step)


def profile(step, top=32):
    """Where a step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    rows = [(each.key, each.self_device_time_total, each.count) for each in found.key_averages()]
    rows.sort(key=lambda row: -row[1])
    total = sum(row[1] for row in rows)
    say(f"kernels of a step: {total / 1e3:.2f} ms")
    for name, us, count in rows[:top]:
        print(f"  {us / 1e3:8.3f} ms {count:4} x {us / count:8.1f} us  {name[:90]}")


PARTS = {"lists": lists, "rope": rope, "parts": parts, "shared": shared, "model": model}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("what", nargs="*", default=list(PARTS))
    for each in parser.parse_args().what or PARTS:
        say("---", each)
        PARTS[each]()
    say("done")
