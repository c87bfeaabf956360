"""What training adds to the products, op by op: `python benchmarks/training_kernels.py [--small]`.

The head's loss over 163,840 words, weight gradients added to float32 sums, AdamW, E5M6; each beside what it
replaces, at the sizes of Moonlight with 16,384 tokens. Every line is first held against the definition, and
one that is further off than 2 % ends the run. Loss lines are forward and backward together and count three
products' FLOPs. Memory lines are the peak beyond the operands; "whole" is the definition's. Those of
attention are beyond operands and gradients, and ours may need a twentieth of "whole" at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from torch import Tensor
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.kernels.bench.timing import WORST_ERROR, Bench, Line, relative

Run = Callable[..., Any]
TILES = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4))


def main() -> None:
    """Check and time one suite after another, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal, figures mean nothing")
    parser.add_argument("--only", default="", help=f"one of {', '.join(s.__name__ for s in SUITES)}")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(device, torch.bfloat16, words.small or device == "cpu", [])
    for suite in SUITES:
        if words.only in ("", suite.__name__):
            suite(bench)
            if device == "cuda":
                torch.cuda.empty_cache()
    write_result("training_kernels", [asdict(line) for line in bench.lines], out=words.out, small=bench.small)


# --- the loss


def loss(bench: Bench) -> None:
    """The head, with its weight's gradient returned to autograd, or added to a float32 sum."""
    tokens, width, vocabulary = (64, 32, 500) if bench.small else (16384, 2048, 163840)
    hidden = bench.random(tokens, width, grad=True)
    weight = (bench.random(vocabulary, width, seed=1) / 45).detach().requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=bench.device)
    into = torch.zeros(vocabulary, width, device=bench.device)
    for name, run in heads(bench, into).items():
        error = head_error(run, hidden[: min(1024, tokens)], weight, target, into)

        def both(run: Run = run) -> None:
            hidden.grad = weight.grad = None
            run(hidden, weight, target).backward()

        work, shape = 6.0 * tokens * width * vocabulary, f"{tokens} x {width} x {vocabulary}"
        bench.add("loss, both ways", shape, name, bench.time(both, [()]), work, "TFLOP/s", error)
    hidden.grad = weight.grad = None
    head_parts(bench, hidden.detach(), weight.detach(), target, into)
    del into
    if bench.device == "cuda":
        head_peaks(bench, hidden.detach()[:8192].requires_grad_(), weight, target[:8192])


def before(hidden: Tensor, weight: Tensor, target: Tensor, *, impl: str = "chunked") -> Tensor:
    """The op that computes logits again in backward, or the definition."""
    return ops.linear_cross_entropy(hidden, weight, target, impl=impl).sum() / len(target)


def now(
    hidden: Tensor, weight: Tensor, target: Tensor, *, impl: str, chunk: int | None, into: Tensor | None
) -> Tensor:
    """The op whose gradients are made in the forward pass."""
    factor = 1 / len(target)
    return ops.linear_cross_entropy_sum(
        hidden, weight, target, factor=factor, chunk=chunk, into_VD=into, impl=impl
    )[0]


def heads(bench: Bench, into: Tensor) -> dict[str, Run]:
    """What was before, then the sum in its implementations and with several sizes of chunk."""
    found: dict[str, Run] = {"before": before, "chunked": partial(now, impl="chunked", chunk=None, into=None)}
    if bench.device == "cuda":
        found["triton"] = partial(now, impl="triton", chunk=None, into=None)
        for chunk in (1024, 2048, 4096, 8192):
            found[f"triton, into, {chunk}"] = partial(now, impl="triton", chunk=chunk, into=into)
    return found


def head_error(run: Run, hidden: Tensor, weight: Tensor, target: Tensor, into: Tensor) -> float:
    """The larger of both gradients' errors on some rows, against the definition in float32."""
    results = []
    into.zero_()
    for function, dtype in ((run, weight.dtype), (partial(before, impl="reference"), torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        function(*leaves, target[: len(hidden)]).backward()
        dhidden, dweight = (leaf.grad for leaf in leaves)
        results.append((dhidden, into.clone() if dweight is None else dweight))
    return max(relative(fast, slow) for fast, slow in zip(*results, strict=True))


def head_parts(bench: Bench, hidden: Tensor, weight: Tensor, target: Tensor, into: Tensor) -> None:
    """The three products and the kernel between them, of one chunk."""
    rows = min(4096, len(hidden))
    hidden, target = hidden[:rows], target[:rows]
    logits, work = hidden @ weight.t(), 2.0 * rows * weight.numel()
    shape = f"{rows} x {weight.shape[1]} x {weight.shape[0]}"
    parts: dict[str, Run] = {
        "logits": lambda: hidden @ weight.t(),
        "hidden gradient": lambda: logits @ weight,
        "weight gradient": lambda: logits.t() @ hidden,
    }
    if bench.device == "cuda":
        parts["weight gradient, added"] = lambda: ops.add_weight_gradient(into, logits, hidden)
    for name, run in parts.items():
        bench.add("loss, a chunk's product", shape, name, bench.time(run, [()]), work, "TFLOP/s", None)
    if bench.device == "cuda":
        from benthic.kernels.triton_loss import turn

        seconds = bench.time(lambda: turn(logits, target, -100, gradient=True), [()])
        moved = 2.0 * logits.numel() * logits.itemsize
        bench.add("loss, logits to gradients", shape, "triton", seconds, moved, "TB/s", None)


def head_peaks(bench: Bench, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Memory of both ways beyond the operands; the sum is no operand of the definition, so it counts."""
    whole = 0
    for name in ("whole", "before", "triton", "triton, into"):
        hidden.grad = weight.grad = None
        held = fresh_peak()
        into = torch.zeros_like(weight, dtype=torch.float32) if name == "triton, into" else None
        run = partial(before, impl="reference" if name == "whole" else "chunked")
        if name.startswith("triton"):
            run = partial(now, impl="triton", chunk=None, into=into)
        run(hidden, weight, target).backward()
        peak = torch.cuda.max_memory_allocated() - held
        whole = whole or peak
        shape = f"{len(hidden)} x {weight.shape[1]} x {weight.shape[0]}"
        memory_line(bench, "loss, peak memory", shape, name, peak, whole)


def fresh_peak() -> int:
    """Forget the peak of before; what is allocated now."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory_line(bench: Bench, op: str, shape: str, name: str, peak: int, whole: int) -> None:
    """Record and say a line without a time."""
    print(f"{op:22} {shape:34} {name:16} {peak / 2**30:8.2f} GiB = {peak / whole:.4f}")
    bench.lines.append(Line(op, shape, name, 0.0, peak / 1e12, "TB", None))


# --- attention


def attention(bench: Bench) -> None:
    """Peak memory of forward and backward beside attention that has all scores at once."""
    rows, length, heads = (2, 64, 2) if bench.small else (4, 4096, 16)
    operands = [bench.random(rows * length, heads, 128, seed=seed, grad=True) for seed in range(3)]
    dout = bench.random(rows * length, heads, 128, seed=3)
    starts = torch.arange(0, rows + 1, device=bench.device, dtype=torch.int32) * length
    longest = {"max_seqlen_q": length, "max_seqlen_k": length, "scale": 128**-0.5}
    shape, exact, whole = f"b{rows} s{length} h{heads} (128,128) causal", None, 0
    ways: dict[str, Run] = {
        "whole": partial(all_scores, rows=rows, dtype=None),
        "whole, float32": partial(all_scores, rows=rows, dtype=torch.float32),
        "ours": lambda q, k, v: ops.attention(q, k, v, starts, starts, **longest),
    }
    for name, run in ways.items():
        peak, *results = remembered(run, operands, dout)
        exact, whole = exact or results, whole or peak
        error = max(relative(fast, slow) for fast, slow in zip(results, exact, strict=True))
        if not error <= WORST_ERROR:
            msg = f"attention by {name}: relative error {error:.1e} exceeds {WORST_ERROR}"
            raise SystemExit(msg)
        if bench.device == "cuda":
            memory_line(bench, "attention, peak memory", shape, name, peak, whole)
            if name == "ours" and not bench.small and 20 * peak > whole:
                msg = f"attention needs {peak / whole:.3f} of the memory of all scores, not a twentieth"
                raise SystemExit(msg)
        del results


def remembered(run: Run, operands: list[Tensor], dout: Tensor) -> tuple[Any, ...]:
    """Peak bytes beyond operands and gradients (0 on a CPU), then the output, which counts, and gradients."""
    for operand in operands:
        operand.grad = None
    held = fresh_peak() if dout.is_cuda else 0
    out = run(*operands)
    out.backward(dout)
    gradients = [operand.grad for operand in operands]
    peak = torch.cuda.max_memory_allocated() - held - sum(x.nbytes for x in operands) if dout.is_cuda else 0
    return peak, out.detach(), *gradients


def all_scores(q: Tensor, k: Tensor, v: Tensor, *, rows: int, dtype: torch.dtype | None) -> Tensor:
    """Causal attention of rows of one length in plain torch; softmax in `dtype`."""
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1, dtype=dtype).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(0, 1)


# --- sums of gradients


def gradients(bench: Bench) -> None:
    """Weight gradients of experts and of dense layers, added to float32 sums."""
    rows, experts = (64, 4) if bench.small else (98304, 64)
    for inner, outer in ((16, 24),) if bench.small else ((2048, 2816), (1408, 2048)):
        dy, x = bench.random(rows, outer), bench.random(rows, inner, seed=1)
        ends = torch.arange(1, experts + 1, device=bench.device, dtype=torch.int32) * (rows // experts)
        sum_ = torch.zeros(experts, outer, inner, device=bench.device)
        shape, work = f"{experts} x {rows // experts} ({inner}->{outer})", 2.0 * rows * inner * outer
        for name, run in grouped_ways(bench, dy, x, ends).items():
            error = sum_error(run, sum_, dy, x, ends)
            seconds = bench.time(partial(run, sum_), [()])
            bench.add("experts' gradient, added", shape, name, seconds, work, "TFLOP/s", error)
    rows = 64 if bench.small else 16384
    for inner, outer in ((16, 24),) if bench.small else ((2048, 3072), (2048, 22528), (2816, 2048)):
        dy, x = bench.random(rows, outer), bench.random(rows, inner, seed=1)
        sum_ = torch.zeros(outer, inner, device=bench.device)
        shape, work = f"{rows} ({inner}->{outer})", 2.0 * rows * inner * outer
        for name, run in dense_ways(bench, dy, x).items():
            error = sum_error(run, sum_, dy, x, None)
            seconds = bench.time(partial(run, sum_), [()])
            bench.add("dense gradient, added", shape, name, seconds, work, "TFLOP/s", error)


def grouped_ways(bench: Bench, dy: Tensor, x: Tensor, ends: Tensor) -> dict[str, Run]:
    """The library's product and torch's sum, the same with our sum, and our product with several tiles."""
    found: dict[str, Run] = {"before": lambda sum_: sum_.add_(F.grouped_mm(dy.t(), x, offs=ends))}
    if bench.device == "cuda":
        found["product alone"] = lambda _: F.grouped_mm(dy.t(), x, offs=ends)
        found["grouped_mm"] = lambda sum_: ops.add_weight_gradient(sum_, dy, x, ends, impl="grouped_mm")
        for tile in TILES:
            found[f"triton {tile}"] = partial(_with_tiles, tile, dy, x, ends)
    return found


def _with_tiles(tile: tuple[int, ...], dy: Tensor, x: Tensor, ends: Tensor, sum_: Tensor) -> None:
    from benthic.kernels import triton_moe

    kept, triton_moe.tiles = triton_moe.tiles, lambda *_: tile
    try:
        ops.add_weight_gradient(sum_, dy, x, ends, impl="triton")
    finally:
        triton_moe.tiles = kept


def dense_ways(bench: Bench, dy: Tensor, x: Tensor) -> dict[str, Run]:
    """A rounded product and torch's sum, a wide one and torch's sum, and one that adds."""
    found: dict[str, Run] = {"before": lambda sum_: sum_.add_(dy.t() @ x)}
    if bench.device == "cuda":
        found["mm_wide"] = lambda sum_: sum_.add_(ops.weight_gradient(dy, x, dtype=torch.float32))
        found["addmm"] = lambda sum_: ops.add_weight_gradient(sum_, dy, x, impl="addmm")
        found["product alone"] = lambda _: dy.t() @ x
    return found


def sum_error(run: Run, sum_: Tensor, dy: Tensor, x: Tensor, ends: Tensor | None) -> float | None:
    """Against the definition in float32, from a sum of halves; None where nothing was added."""
    sum_.fill_(0.5)
    run(sum_)
    if sum_.eq(0.5).all():
        return None
    exact = torch.full_like(sum_, 0.5)
    ops.add_weight_gradient(exact, dy.float(), x.float(), ends, impl="reference")
    return relative(sum_, exact)


def accumulate(bench: Bench) -> None:
    """A bfloat16 gradient of the embedding's size."""
    count = 1000 if bench.small else 163840 * 2048
    sum_, x = torch.zeros(count, device=bench.device), bench.random(count)
    ways: dict[str, Run] = {"before": lambda: sum_.add_(x)}
    if bench.device == "cuda":
        ways["triton"] = lambda: ops.accumulate(sum_, x, impl="triton")
    for name, run in ways.items():
        sum_.zero_()
        run()
        error = relative(sum_, x)
        bench.add("accumulate", f"{count}", name, bench.time(run, [()]), 10.0 * count, "TB/s", error)


# --- the rest


def choice(bench: Bench) -> None:
    """Moonlight's gate on the logits of 16,384 tokens, the balance loss of four rows, and the counts."""
    tokens = 64 if bench.small else 16384
    logits = bench.random(tokens, 64).float().requires_grad_()
    bias = torch.zeros(64, device=bench.device)
    gate = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "top_k": 6, "n_group": 1, "topk_group": 1}
    gate |= {"norm_topk_prob": True, "routed_scaling_factor": 2.446}
    count = torch.zeros(64, dtype=torch.int64, device=bench.device)
    ours = ("triton_autograd", "triton") if bench.device == "cuda" else ("reference", "reference")

    def both(ways: tuple[str, str]) -> Tensor:
        logits.grad = None
        routing = ops.route(logits, bias, **gate, impl=ways[0])
        loss, _ = ops.balance_loss(routing.scores_TE, top_k=6, rows=4, factor=100.0, impl=ways[1])
        ops.count_experts(count, routing.expert_TK, impl=ways[1])
        (loss + routing.weight_TK.square().sum()).backward()
        assert logits.grad is not None  # noqa: S101 (a benchmark's check)
        return logits.grad

    exact = both(("reference", "reference"))
    for name, ways in (("ours", ours), ("reference", ("reference", "reference"))):
        error, seconds = relative(both(ways), exact), bench.time(partial(both, ways), [()])
        bench.add("route and balance", f"{tokens} x 64", name, seconds, 28.0 * logits.numel(), "TB/s", error)


def placing(bench: Bench) -> None:
    """Where rows lie in an exchange of eight ranks, each with 4,096 tokens and 8 of 64 experts."""
    tokens, ranks, per_rank = (16 if bench.small else 4096), 8, 8
    arrived = torch.rand(ranks * tokens, ranks * per_rank, device=bench.device).topk(6).indices.int()
    experts = arrived[:tokens].contiguous()
    goes, counts = ops.choose_ranks(experts, per_rank=per_rank, ranks=ranks)
    rows, here = int(counts[:, 0].sum()), arrived.numel()
    dweight = torch.rand(ranks * tokens, 6, device=bench.device)
    where = {"per_rank": per_rank, "ranks": ranks}
    calls: dict[str, Run] = {
        "choose_ranks": partial(ops.choose_ranks, experts, **where),
        "place_departures": partial(ops.place_departures, goes, rows=rows),
        "place_copies": partial(ops.place_copies, arrived, first=8, experts=per_rank, rows=here),
        "home_slots": partial(ops.home_slots, experts, dweight, max_tokens=tokens, **where),
    }
    for name, call in calls.items():
        for impl in ("triton", "reference") if bench.device == "cuda" else ("reference",):
            seconds = bench.time(partial(call, impl=impl), [()])
            bench.add(name, f"{tokens} x {ranks} ranks", impl, seconds, 12.0 * here, "TB/s", None)


def adamw(bench: Bench) -> None:
    """One update of a layer's experts with moments in bfloat16."""
    count = 1000 if bench.small else 64 * 2816 * 2048
    by = ops.AdamWStep(0.9, 0.95, 1e-8, step_size=1e-4, decay=1e-5, correction=0.05, scale=0.7)
    gradient = bench.random(count).float()
    for impl in ("triton", "reference") if bench.device == "cuda" else ("reference",):
        results = []
        for name in (impl, "reference"):
            master = bench.random(count, seed=1).float()
            moments = [torch.zeros(count, device=bench.device, dtype=torch.bfloat16) for _ in range(2)]
            ops.adamw(master, gradient, *moments, by, impl=name)
            results.append(master)
        error = relative(*results)
        seconds = bench.time(partial(ops.adamw, master, gradient, *moments, by, impl=impl), [()])
        bench.add("adamw", f"{count}", impl, seconds, 20.0 * count, "TB/s", error)


def e5m6(bench: Bench) -> None:
    """The output of attention, packed and unpacked."""
    rows, width = (16, 128) if bench.small else (65536, 2048)
    x = bench.random(rows, width)
    packed, scale = ops.quantise_e5m6(x, impl="reference")
    moved = rows * width * 3.53
    for impl in ("triton", "reference") if bench.device == "cuda" else ("reference",):
        assert torch.equal(ops.quantise_e5m6(x, impl=impl)[0], packed), impl  # noqa: S101 (a benchmark's check)
        seconds = bench.time(lambda impl=impl: ops.quantise_e5m6(x, impl=impl), [()])  # type: ignore[misc]
        bench.add("quantise_e5m6", f"{rows} x {width}", impl, seconds, moved, "TB/s", None)
        run = partial(ops.dequantise_e5m6, packed, scale, width, impl=impl)
        bench.add("dequantise_e5m6", f"{rows} x {width}", impl, bench.time(run, [()]), moved, "TB/s", None)


SUITES = (loss, attention, gradients, accumulate, choice, placing, adamw, e5m6)


if __name__ == "__main__":
    main()
