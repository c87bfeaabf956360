"""Check and time variants of the Gluon attention kernels on one Hopper GPU; prints one table last.

    cd <checkout of branch attn> && PYTHONPATH=src python drafts/attn_run.py

Each variant is checked against float64 in a process of its own, all at once and with a time limit, so that one that hangs
or is wrong leaves the others alone. Those that are right are timed in one process, in turns. About 90 s in all.
"""

import argparse
import json
import os
import subprocess
import sys
import time

# Forward: heads together, tile after tile in one program, stages of the ring. The first is main's kernel.
FORWARD = {
    "main": (1, False, 2),
    "order16": (16, False, 2),
    "order4": (4, False, 2),
    "turn16": (16, True, 2),
    "turn4": (4, True, 2),
    "turn16s3": (16, True, 3),  # (128, 128) alone has the shared memory
}
# Backward: heads together, dQ (and dK dV of the one pass) tile after tile, loops of dK and dV without branches, one pass
# with atomic sums, dK and dV of that pass without dQ. The last two are for (128, 128) alone.
BACKWARD = {
    "main": (1, False, "", False, False),
    "order16": (16, False, "", False, False),
    "order4": (4, False, "", False, False),
    "split16": (16, False, "wait", False, False),
    "beside16": (16, False, "beside", False, False),
    "turn16": (16, True, "wait", False, False),
    "early16": (16, False, "", False, True),
    "turnearly16": (16, True, "", False, True),
    "fused16": (16, False, "", True, False),
    "fused4": (4, False, "", True, False),
    "turnfused16": (16, True, "", True, False),
}
DIMS = [(192, 128), (128, 128)]
CHECKS = {
    "packs": ((1000, 3, 129, 640, 128, 1100), None, 16, 16, True),
    "chunks": ((1, 300, 64, 200), (700, 301, 65, 100), 4, 2, True),  # key heads shared; queries that see no key
    "whole": ((1000, 3, 129, 640), (130, 64, 777, 0), 4, 4, False),
    "beside": ((100, 200, 60), None, 16, 16, True),  # NaN in the middle sequence
}
SHAPES = [(4, 4096), (1, 16384)]


def choose(kind, name):
    from benthic.kernels import gluon_attention, gluon_attention_backward, gluon_tiles

    if kind == "forward":
        gluon_tiles.HEADS_TOGETHER, gluon_attention.PERSISTENT, gluon_attention.STAGES = FORWARD[name]
    else:
        backward = gluon_attention_backward
        together, backward.PERSISTENT, backward.SPLIT, backward.FUSED, backward.EARLY = BACKWARD[name]
        gluon_tiles.HEADS_TOGETHER = together


def suits(kind, name, width):
    """Whether a variant is one at this width."""
    return width == 128 or not (FORWARD[name][2] == 3 if kind == "forward" else any(BACKWARD[name][3:]))


def starts_of(lengths):
    import torch

    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def reference(q, k, v, grad, queries, keys, scale, causal):
    """Output, log-sum-exp [H, T] and gradients in float64."""
    import torch

    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    groups, outs, sums, at_q, at_k = q.shape[1] // k.shape[1], [], [], 0, 0
    for n, m in zip(queries, keys):
        one_q = q[at_q : at_q + n].transpose(0, 1)
        one_k, one_v = (x[at_k : at_k + m].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        s = one_q @ one_k.transpose(1, 2) * scale
        if causal:
            seen = torch.arange(m, device="cuda")[None] <= torch.arange(n, device="cuda")[:, None] + (m - n)
            s = s.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(s, -1) if m else torch.full((q.shape[1], n), -torch.inf, device="cuda").double()
        p = (s - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp()
        outs.append((p @ one_v).transpose(0, 1))
        sums.append(lse)
        at_q, at_k = at_q + n, at_k + m
    out = torch.cat(outs)
    return out, torch.cat(sums, 1), torch.autograd.grad(out, (q, k, v), grad.double())


def run_backward(dims, q, k, v, out, lse, grad, starts_q, starts_k, max_q, max_k, scale, causal):
    from types import SimpleNamespace

    from benthic.kernels import gluon_attention_backward as backward

    ctx = SimpleNamespace(saved_tensors=(q, k, v, out, lse, starts_q, starts_k), settings=(max_q, max_k, scale, causal))
    return backward.gradients(ctx, grad)[:3]


def check(kind, name, width, value):
    """Print a line a case: its worst relative error, or what failed."""
    import torch

    from benthic.kernels import gluon_attention

    choose(kind, name)
    for case, (queries, keys, heads, key_heads, causal) in CHECKS.items():
        if name.endswith("4") and case != "packs":  # as its sixteenfold sibling
            continue
        began = time.time()
        keys = keys or queries
        torch.manual_seed(0)
        made = lambda *shape: torch.randn(*shape, device="cuda").to(torch.bfloat16)  # noqa: E731
        q, k, v = made(sum(queries), heads, width), made(sum(keys), key_heads, width), made(sum(keys), key_heads, value)
        grad, scale = made(sum(queries), heads, value), width**-0.5
        clean = [x.clone() for x in (q, k, v, grad)]
        if case == "beside":
            for x in (q, k, v, grad):
                x[100:300] = torch.nan
        starts_q, starts_k = starts_of(queries), starts_of(keys)
        out, lse, gradients = reference(*clean, queries, keys, scale, causal)
        if kind == "forward":
            ours, sums = gluon_attention.attention(
                q, k, v, starts_q, starts_k, max_seqlen_q=max(queries), max_seqlen_k=max(keys), scale=scale, causal=causal
            )
            pairs, sums = [(ours, out)], sums.T
        else:
            dout = grad
            given = out.to(q.dtype), lse.float().contiguous()
            found = run_backward(
                (width, value), q, k, v, *given, dout, starts_q, starts_k, max(queries), max(keys), scale, causal
            )
            pairs = list(zip(found, gradients))
        torch.cuda.synchronize()
        worst = 0.0
        for found, exact in pairs:
            if case == "beside":
                found, exact = (torch.cat([x[:100], x[300:]]) for x in (found, exact))
            error = ((found.double() - exact).norm() / exact.norm()).item()
            worst = max(worst, error if error == error else 1e9)
        if kind == "forward" and case != "beside":
            seen = ~lse.isinf()
            if not torch.equal(sums.isneginf(), lse.isneginf()):
                worst = 2e9
            worst = max(worst, (sums[seen] - lse[seen]).abs().max().item())
        print(json.dumps([case, worst, round(time.time() - began, 1)]), flush=True)


def timed(call, calls):
    import torch

    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / calls


def in_turns(calls, rounds=5, each=4):
    """The median of `rounds` rounds of a few calls, in ms, of each of several functions that take turns."""
    import statistics

    for call in calls.values():
        call()
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(timed(call, each))
    return {name: statistics.median(times) for name, times in found.items()}


def timing(right):
    """Print lines of [what, variant, width, shape, ms]."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benthic.kernels import gluon_attention
    from benthic.kernels import gluon_attention_backward as backward

    for width, value in reversed(DIMS):
        for sequences, length in SHAPES:
            tokens, heads, scale = sequences * length, 16, width**-0.5
            q, k, v, grad = (
                torch.randn(tokens, heads, w, device="cuda").to(torch.bfloat16) for w in (width, width, value, value)
            )
            starts = starts_of([length] * sequences)
            with torch.no_grad():
                out, lse = gluon_attention.attention(
                    q, k, v, starts, starts, max_seqlen_q=length, max_seqlen_k=length, scale=scale, causal=True
                )
            lse = lse.T.contiguous()

            def forward(name):
                choose("forward", name)
                with torch.no_grad():
                    gluon_attention.attention(
                        q, k, v, starts, starts, max_seqlen_q=length, max_seqlen_k=length, scale=scale, causal=True
                    )

            def gradients(name):
                choose("backward", name)
                run_backward((width, value), q, k, v, out, lse, grad, starts, starts, length, length, scale, True)

            grads = [torch.empty_like(x) for x in (q, k, v)]
            delta = backward.deltas(out, grad)
            operands = (q, k, v, grad, lse, delta, starts, starts)

            def part(name, which):
                choose("backward", name)
                if which == "dq":
                    backward.write_query_gradient(grads[0], operands, length, scale, causal=True)
                elif which == "dkv":
                    backward.write_key_gradients(grads[1], grads[2], operands, length, scale, causal=True)
                else:
                    first = grads[0] if which == "fused" else None
                    backward.write_fused(first, *grads[1:], operands, length, length, scale, causal=True)

            def batch(x):
                return x.view(sequences, length, heads, -1).transpose(1, 2)

            leaves = [batch(x).detach().requires_grad_() for x in (q, k, v)]
            theirs = None
            try:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    theirs = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
            except RuntimeError as error:
                print(f"cuDNN: {error}", file=sys.stderr)

            def cudnn():
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
                    scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)

            suited = [n for n in right[str(width)]["backward"]]
            calls = {f"forward {n}": lambda n=n: forward(n) for n in right[str(width)]["forward"]}
            if theirs is not None:
                calls["forward cudnn"] = cudnn
            calls |= {f"backward {n}": lambda n=n: gradients(n) for n in suited}
            if theirs is not None:
                calls["backward cudnn"] = lambda: torch.autograd.grad(theirs, leaves, batch(grad), retain_graph=True)
            for n in suited:
                *_, fused, early = BACKWARD[n]
                parts = ["fused"] if fused else ["early"] if early else ["dq", "dkv"]
                calls |= {f"{p} {n}": lambda n=n, p=p: part(n, p) for p in parts}
            calls["row_dots -"] = lambda: backward.deltas(out, grad)
            for name, ms in in_turns(calls).items():
                print(json.dumps([*name.split(), width, f"{sequences}x{length}", ms]), flush=True)


def table(lines):
    """TFLOP/s of whole passes, then microseconds of parts."""
    found = {(what, n, w, s): ms for what, n, w, s, ms in lines}
    columns = [(w, f"{b}x{t}", b, t, v) for w, v in DIMS for b, t in SHAPES]
    print(f"{'':18}" + "".join(f"{f'({w}) {s}':>15}" for w, s, *_ in columns))
    for what in ("forward", "backward", "dq", "dkv", "early", "fused", "row_dots"):
        for n in dict.fromkeys(n for kind, n, _w, _s in found if kind == what):
            cells = []
            for w, s, b, t, v in columns:
                ms = found.get((what, n, w, s))
                work = 16 * b * t * t * (w + v) * (2.5 if what == "backward" else 1)
                whole = what in ("forward", "backward")
                cells.append("-" if ms is None else f"{work / ms / 1e9:.0f} TF" if whole else f"{ms * 1e3:.0f} us")
            print(f"{what + ' ' + n:18}" + "".join(f"{cell:>15}" for cell in cells))


def started(*arguments):
    command = [sys.executable, os.path.abspath(__file__), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, until):
    """Lines a process printed and its last words, killed at `until`."""
    try:
        out, errors = process.communicate(timeout=max(until - time.time(), 0.1))
        words = errors.strip().splitlines()[-1][:160] if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        words = "killed at the time limit"
    lines = []
    for line in (out or "").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            pass
    return lines, words


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", nargs=4)
    parser.add_argument("--time")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--only", help="variants of the backward and forward pass, divided by commas")
    options = parser.parse_args()
    if options.check:
        kind, name, width, value = options.check
        return check(kind, name, int(width), int(value))
    if options.time:
        return timing(json.loads(options.time))
    began = time.time()
    query = ["nvidia-smi", "--query-gpu=name,power.limit,clocks.max.sm", "--format=csv,noheader"]
    print(subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    wanted = [
        (kind, name, width, value)
        for width, value in DIMS
        for kind, variants in (("backward", BACKWARD), ("forward", FORWARD))
        for name in variants
        if suits(kind, name, width) and (not options.only or name in options.only.split(","))
    ]
    processes = [(what, started("--check", *what)) for what in wanted]
    right = {str(width): {"forward": [], "backward": []} for width, _ in DIMS}
    for what, process in processes:
        lines, words = ended(process, began + options.seconds * 0.66)
        errors = {case: error for case, error, _ in lines}
        bad = [case for case, error in errors.items() if error > 1.2e-2]
        if "packs" in errors and not bad:
            right[str(what[2])][what[0]].append(what[1])
        count = 1 if what[1].endswith("4") else len(CHECKS)
        verdict = "WRONG" if bad else "right" if len(errors) == count else "unfinished"
        print(*what, verdict, " ".join(f"{c}:{e:.1e}({s:.0f}s)" for c, e, s in lines), words, flush=True)
    print(f"checked in {time.time() - began:.0f} s", flush=True)
    lines, words = ended(started("--time", json.dumps(right)), began + options.seconds)
    print(f"done in {time.time() - began:.0f} s {words}")
    table(lines)


if __name__ == "__main__":
    main()
