"""Small kernels of a decode step, old beside new. PYTHONPATH=src python drafts/run_decode_small.py [permute end head]

Checks: permute (old, new, definition; slots or none; empty tensors are NaN), best tokens and judged drafts
against torch, the head's product into a buffer against F.linear; all to the bit, and 20 repeats. Then times:
microseconds a call in CUDA graphs of 20, medians of 9 in turns.
"""

import functools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import decode_small_old as old

from benthic.kernels import launch, ops
from benthic.kernels import triton_permute as new
from benthic.kernels.reference import moe, sampling

V, D, E, K, CALLS = 163_840, 2048, 64, 6, 20
SIZES = 1, 8, 64, 256
CASES = [(t, K, E, D, s) for t in SIZES for s in (True, False)]
CASES += [(t, K, E, D, True) for t in (2, 21, 22, 65, 257, 341)] + [(256, 8, 256, 7168, True), (16, 8, 256, 7168, True)]
FAILED = []


def say(name, good):
    FAILED.extend([] if good else [name])
    print(f"{'ok  ' if good else 'BAD '} {name}", flush=True)


def copies(tokens, top_k, experts, width, slots, seed=0):
    g = torch.Generator("cuda").manual_seed(seed + tokens)
    logits = torch.rand(tokens, experts, generator=g, device="cuda")
    logits[:, : experts // 8] += 0.5  # uneven
    x = torch.randn(tokens, width, generator=g, device="cuda").bfloat16()
    slot = torch.arange(tokens, device="cuda")
    slot[3::4] = -1
    return x, logits.topk(top_k).indices.int(), experts, slot if slots else None


def parts(p):
    return p.rows_RD, p.ends_E, p.maps.row_TK, p.maps.copy_R


def alike(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def check_permute(case, repeats=20):
    x, expert, experts, slot = copies(*case)
    exact = parts(moe.permute(x, moe.followed(expert, slot), experts))
    good = alike(parts(old.permute_few(x, expert, experts, slot)), exact)
    for _ in range(repeats):
        good &= alike(parts(new.permute_few(x, expert, experts, slot)), exact)
    with launch.in_turn():
        good &= alike(parts(new.permute_few(x, expert, experts, slot)), exact)
    return good


def made_logits(rows, seed=1):
    g = torch.Generator("cuda").manual_seed(seed)
    logits = (torch.randn(rows, V, generator=g, device="cuda") * 2).bfloat16()
    kinds = (torch.nan, torch.inf, -torch.inf)
    for i in range(rows // 8):
        if i % 4 < 3:
            logits[8 * i + 5, i * 631 % V] = kinds[i % 4]
        else:
            logits[8 * i + 5] = kinds[2]
    return logits


def noted(rows, queries, seed=0):
    s, many = rows // queries, {"dtype": torch.int64, "device": "cuda"}
    fed = torch.randint(V, (s, queries), generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    owner = torch.randperm(s + 1, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))[:s]
    whole = torch.full((rows + 4 * s,), -9, **many)
    lines = torch.full((s + 2, queries), -7, **many)
    cut = whole[: rows + s], whole[rows + s : rows + 2 * s], whole[rows + 2 * s : rows + 3 * s]
    return whole, lines, fed, ops.Notes(*cut, owner, lines)


def check_end(rows, queries, repeats=20):
    logits = made_logits(rows)
    best = sampling.best_tokens(logits)
    good = all(torch.equal(ops.best_tokens(logits, impl="triton"), best) for _ in range(repeats))
    wide = torch.cat((logits[:1].float(), logits[:, :1000].float().new_zeros(1, V)), 0)
    good &= torch.equal(ops.best_tokens(wide, impl="triton"), sampling.best_tokens(wide))
    found = []
    for impl in ("reference", *["triton"] * repeats):
        whole, lines, fed, notes = noted(rows, queries)
        for s in range(len(fed)):
            held = s % queries
            fed[s, 1 : 1 + held] = best[s * queries : s * queries + held]
        ops.judge_greedy(logits, fed, notes, impl=impl)
        found.append((whole, lines))
    return good and all(alike(found[0], each) for each in found[1:])


def check_head(rows, weight):
    hidden = torch.randn(rows, D, device="cuda").bfloat16()
    out = torch.full((rows, V), torch.nan, device="cuda", dtype=torch.bfloat16)
    return all(
        torch.equal(torch.mm(hidden, weight.t(), out=out), F.linear(hidden, weight)) for _ in range(3)
    )


def recorded(call):
    """A graph of CALLS calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(CALLS)]
    graph.kept = kept
    return graph


def compare(name, calls):
    graphs = {what: recorded(call) for what, call in calls.items()}
    times = {what: [] for what in graphs}
    for turn in range(10):
        for what, graph in graphs.items():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            torch.cuda.synchronize()
            times[what] += [first.elapsed_time(last) * 1e3 / CALLS] if turn else []
    said = "  ".join(f"{what} {statistics.median(t):7.2f}" for what, t in times.items())
    print(f"     {name:34s} us: {said}", flush=True)


def time_permute(tokens):
    count = max(1, min(CALLS, 160_000_000 // (tokens * 7 * D * 2) + 1)) if tokens > 8 else CALLS
    sets = [copies(tokens, K, E, D, slots=True, seed=i) for i in range(count)]
    logits = [torch.randn(tokens, E, device="cuda") for _ in range(count)]
    bias = torch.zeros(E, device="cuda")
    gate = {
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "top_k": K, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.446,
    }  # fmt: skip

    def routed(permute, i):
        x, _, experts, slot = sets[i % count]
        return permute(x, ops.route(logits[i % count], bias, **gate).expert_TK, experts, slot)

    def apart(part):  # the other division of work, whatever the size
        def call(i):
            kept, new.APART = new.APART, part
            try:
                return new.permute_few(*sets[i % count])
            finally:
                new.APART = kept

        return call

    compare(f"permute {tokens}", {
        "old": lambda i: old.permute_few(*sets[i % count]), "new": lambda i: new.permute_few(*sets[i % count]),
        "a copy a program": apart(4096), "a token a program": apart(0),
    })  # fmt: skip
    compare(f"route + permute {tokens}", {
        "route": lambda i: ops.route(logits[i % count], bias, **gate),
        "old": functools.partial(routed, old.permute_few), "new": functools.partial(routed, new.permute_few),
    })  # fmt: skip


def time_end(rows):
    count = max(1, min(CALLS, 200_000_000 // (rows * V * 2) + 1))
    sets = [made_logits(rows, seed=i) for i in range(count)]
    _, _, fed, notes = noted(rows, 1)

    def judge(impl):
        return lambda i: ops.judge_greedy(sets[i % count], fed, notes, impl=impl)

    compare(f"end of a step {rows}", {"old": judge("reference"), "new": judge("triton")})
    compare(f"best tokens {rows}", {
        "torch max": lambda i: sets[i % count].max(-1), "argmax": lambda i: sets[i % count].argmax(-1),
        "new": lambda i: ops.best_tokens(sets[i % count], impl="triton"),
    })  # fmt: skip


def time_head(rows, weight):
    hidden, out = torch.randn(rows, D, device="cuda").bfloat16(), torch.empty(rows, V, device="cuda").bfloat16()
    _, _, fed, notes = noted(rows, 1)

    def before(_):
        logits = F.linear(hidden, weight)
        out.copy_(logits)
        ops.judge_greedy(logits, fed, notes, impl="reference")

    def now(_):
        torch.mm(hidden, weight.t(), out=out)
        ops.judge_greedy(out, fed, notes, impl="triton")

    compare(f"head, copy, end {rows}", {"old": before, "new": now})


def warm(number, of):
    """Compile a share of the kernels."""
    jobs = [functools.partial(check_permute, case, 1) for case in CASES]
    jobs += [functools.partial(check_end, 8, q, 1) for q in (1, 2, 4)]
    for t in SIZES:
        for apart in (0, 4096):
            jobs.append(functools.partial(both_ways, t, apart))
    for job in jobs[number::of]:
        job()


def both_ways(tokens, apart):
    new.APART = apart
    new.permute_few(*copies(tokens, K, E, D, slots=True))


def main(wanted):
    start = time.time()
    workers = [subprocess.Popen([sys.executable, __file__, "warm", str(i), "8"]) for i in range(8)]
    print("     compiled", [each.wait() for each in workers], f"{time.time() - start:.0f} s", flush=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    weight = (torch.randn(V, D, device="cuda") * 0.02).bfloat16()
    with torch.inference_mode():
        if "permute" in wanted:
            for case in CASES:
                say(f"permute {case}", check_permute(case))
        if "end" in wanted:
            for rows, queries in ((1, 1), (8, 1), (8, 4), (64, 2), (256, 1), (256, 4)):
                say(f"best tokens, judged drafts: {rows} rows, {queries} a sequence", check_end(rows, queries))
        if "head" in wanted:
            say("head into a buffer", all(check_head(rows, weight) for rows in SIZES))
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = False
        for size in SIZES:
            if "permute" in wanted:
                time_permute(size)
            if "end" in wanted:
                time_end(size)
            if "head" in wanted:
                time_head(size, weight)
    print(f"{'FAILED ' + str(FAILED) if FAILED else 'all good'}, {time.time() - start:.0f} s", flush=True)
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    with torch.inference_mode():
        if sys.argv[1:2] == ["warm"]:
            warm(int(sys.argv[2]), int(sys.argv[3]))
        else:
            main(sys.argv[1:] or ["permute", "end", "head"])
