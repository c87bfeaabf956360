"""Forward attention tile after tile beside the kernel of today and cuDNN, on one Hopper GPU.

    PYTHONPATH=src python3 drafts/run_attn.py [--seconds 55] [--skip-checks]

Variants: old = main's kernel; one = a program a tile, masks without key numbers; turn = tile after tile;
turn1 = the same with one place for queries at (128, 128), turn4 = four heads together.
Each (variant, heads) is compiled and checked in a process of its own; those that are right are timed in turns.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # children are forked: the parent must not start CUDA
HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = "old", "one", "turn", "turn1", "turn4"
DIMS = {128: 128, 192: 128}
HEADS = 16
SHAPES = {
    "4x4096": (4096,) * 4,
    "1x16384": (16384,),
    "16x1024": (1024,) * 16,
    "1x4096": (4096,),
    "pack": (5000, 3000, 200, 4184, 100, 3900),
    "short": tuple(50 + (i * 379) % 700 for i in range(40)),
}
CASES = {  # queries, keys, heads, key heads, causal
    "packs": ((1000, 3, 129, 640, 128, 1100), None, 16, 16, True),
    "chunks": ((1, 300, 64, 200), (700, 301, 65, 100), 4, 2, True),
    "blind": ((256, 0, 5, 130), (128, 40, 0, 131), 4, 1, True),
    "full": ((1000, 3, 129, 640), (130, 64, 777, 0), 4, 4, False),
    "equal": ((512, 512, 512), None, 16, 16, True),
    "beside": ((100, 200, 60), None, 16, 16, True),  # NaN in the middle sequence
}
AS_OLD = "packs", "equal"
"""Compared with main's kernels bit for bit, which are compiled for it."""
WANTED = [  # variant, heads, cases
    *(("backward", width, ["packs", "equal", "chunks", "blind", "full"]) for width in DIMS),
    ("turn", 128, [*CASES]),
    ("turn", 192, [*CASES, "parts"]),
    *(("one", width, ["packs", "equal", "full"]) for width in DIMS),
    ("turn1", 128, ["packs", "equal"]),
    *(("turn4", width, ["packs", "equal"]) for width in DIMS),
]


def variant(name):
    """The module, and what chooses the variant."""
    from benthic.kernels import triton_pack_tiles

    if name == "old":
        spec = importlib.util.spec_from_file_location("old_attention", os.path.join(HERE, "old_attention.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules["old_attention"] = module
        spec.loader.exec_module(module)
        return module, lambda programs=None: setattr(triton_pack_tiles, "HEADS_TOGETHER", 16)
    from benthic.kernels import gluon_attention as module
    from benthic.kernels import triton_tiles

    def choose(programs=None):
        triton_pack_tiles.HEADS_TOGETHER = 4 if name == "turn4" else 16
        real = triton_tiles.multiprocessors
        module.multiprocessors = (lambda _: 1 << 30) if name == "one" else (lambda _: programs) if programs else real
        module.query_stages = lambda d_2: 1 if d_2 or name == "turn1" else 2

    return module, choose


def attend(module, q, k, v, starts, max_q, scale, lists, causal=True):
    widths = module.split_width(q.shape[-1])
    return module._attended((q, q), (k, k), v, starts, widths, max_q, scale, lists, causal=causal, apart=False)


def starts_of(lengths):
    import torch

    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def definition(q, k, v, queries, keys, scale, causal, dtype):
    """Output in a dtype by torch, sequence by sequence; log-sum-exp [H, T] in float64 for that."""
    import torch

    q, k, v = (x.to(dtype) for x in (q, k, v))
    groups, outs, sums, at_q, at_k = q.shape[1] // k.shape[1], [], [], 0, 0
    for n, m in zip(queries, keys):
        one = q[at_q : at_q + n].transpose(0, 1)
        ks, vs = (x[at_k : at_k + m].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        seen = torch.ones(n, m, dtype=torch.bool, device="cuda")
        seen = seen.tril(m - n) if causal else seen
        if dtype == torch.float64:
            s = (one @ ks.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
            lse = torch.logsumexp(s, -1) if m else torch.full((q.shape[1], n), -torch.inf, device="cuda").double()
            outs.append(((s - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp() @ vs).transpose(0, 1))
            sums.append(lse)
        elif n and m:
            out = torch.nn.functional.scaled_dot_product_attention(one[None], ks[None], vs[None], attn_mask=seen, scale=scale)
            outs.append(out[0].transpose(0, 1).masked_fill(~seen.any(1)[:, None, None], 0.0))
        else:
            outs.append(torch.zeros(n, q.shape[1], v.shape[-1], dtype=dtype, device="cuda"))
        at_q, at_k = at_q + n, at_k + m
    return torch.cat(outs), torch.cat(sums, 1) if sums else None


def check(name, width, case):
    """Print a line: error over that of torch in bfloat16, of log-sum-exp, and whether bits repeat."""
    import torch

    from benthic.kernels.tile_lists import TileLists

    module, choose = variant(name)
    old, _ = variant("old")
    plain = torch.empty

    def poisoned(*shape, **options):
        made = plain(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    choose(7)
    if case == "parts":
        return parts(module)
    for queries, keys, heads, key_heads, causal in [CASES[case]]:
        keys, value = keys or queries, DIMS[width]
        torch.manual_seed(0)
        made = lambda *shape: torch.randn(*shape, device="cuda").to(torch.bfloat16)  # noqa: E731
        q, k, v = made(sum(queries), heads, width), made(sum(keys), key_heads, width), made(sum(keys), key_heads, value)
        clean, scale = [x.clone() for x in (q, k, v)], width**-0.5
        if case == "beside":
            for x in (q, k, v):
                x[100:300] = torch.nan
        starts = starts_of(queries), starts_of(keys)
        torch.empty = poisoned
        runs = [attend(module, q, k, v, starts, max(queries), scale, TileLists(), causal) for _ in range(21)]
        theirs = attend(old, q, k, v, starts, max(queries), scale, TileLists(), causal) if case in AS_OLD else runs[0]
        torch.empty = plain
        kept = torch.ones(sum(queries), dtype=torch.bool, device="cuda")
        if case == "beside":
            kept[100:300] = False
        exact, exact_lse = definition(*clean, queries, keys, scale, causal, torch.float64)
        other, _ = definition(*clean, queries, keys, scale, causal, torch.bfloat16)
        out, lse = runs[0]
        same = all(torch.equal(a[kept], out[kept]) and torch.equal(b[:, kept], lse[:, kept]) for a, b in runs)
        as_old = torch.equal(theirs[0][kept], out[kept]) and torch.equal(theirs[1][:, kept], lse[:, kept])
        exact, out, other = exact[kept], out[kept].double(), other[kept].double()
        lse, exact_lse = lse[:, kept], exact_lse[:, kept]
        ratio = ((out - exact).norm() / (other - exact).norm()).item()
        seen = ~exact_lse.isinf()
        off = (lse[seen] - exact_lse[seen]).abs().max().item() if torch.equal(lse.isinf(), ~seen) else 9.0
        good = ratio <= 1.5 and off < 1e-3 and same and bool(torch.isfinite(out).all())
        print(json.dumps([case, good, round(ratio, 3), off, same, as_old]), flush=True)


def parts(module):
    """Heads in parts give the bits of joined ones."""
    import torch

    from benthic.kernels.tile_lists import TileLists

    lengths = 1000, 3, 129, 640
    made = lambda *shape: torch.randn(*shape, device="cuda").to(torch.bfloat16)  # noqa: E731
    q, kv, latents = made(sum(lengths), 16, 192), made(sum(lengths), 16, 256), made(sum(lengths), 576)
    starts, lists = starts_of(lengths), TileLists()
    found = module.attention_of_parts(
        q[..., :128], q[..., 128:], kv[..., :128], latents[:, 512:], kv[..., 128:], starts, starts,
        max_seqlen_q=1000, max_seqlen_k=1000, scale=0.07, lists=lists,
    )
    k = torch.cat([kv[..., :128], latents[:, None, 512:].expand(-1, 16, -1)], -1)
    joined, _ = attend(module, q, k, kv[..., 128:].contiguous(), (starts, starts), 1000, 0.07, lists)
    print(json.dumps(["parts", torch.equal(found, joined), 0, 0, True, True]), flush=True)


def backward(old):
    """The module of the backward pass, with the kernels of main or of this branch."""
    from benthic.kernels import gluon_attention_backward as module
    from benthic.kernels import gluon_key_gradients, gluon_query_gradient

    if not hasattr(module, "both"):
        module.both = {False: (gluon_query_gradient.query_gradient, gluon_key_gradients.key_gradients)}
        loaded = []
        for name in ("query_gradient", "key_gradients"):
            spec = importlib.util.spec_from_file_location(f"old_{name}", os.path.join(HERE, f"old_{name}.py"))
            one = importlib.util.module_from_spec(spec)
            sys.modules[f"old_{name}"] = one
            spec.loader.exec_module(one)
            loaded.append(getattr(one, name))
        module.both[True] = tuple(loaded)
    module.query_gradient, module.key_gradients = module.both[old]
    return module


def gradients(old, saved, max_q, max_k, scale, causal, lists, dout):
    from types import SimpleNamespace

    context = SimpleNamespace(saved_tensors=saved, settings=(max_q, max_k, scale, causal, lists))
    return backward(old).gradients(context, dout)[:3]


def check_backward(width, case):
    """As `check`, of the three gradients."""
    import torch

    from benthic.kernels.tile_lists import TileLists

    module, _ = variant("old")
    for queries, keys, heads, key_heads, causal in [CASES[case]]:  # test_attention_gpu.py has NaN beside
        keys, value, scale = keys or queries, DIMS[width], width**-0.5
        torch.manual_seed(0)
        made = lambda *shape: torch.randn(*shape, device="cuda").to(torch.bfloat16)  # noqa: E731
        q, k, v = made(sum(queries), heads, width), made(sum(keys), key_heads, width), made(sum(keys), key_heads, value)
        dout, starts = made(sum(queries), heads, value), (starts_of(queries), starts_of(keys))
        out, lse = attend(module, q, k, v, starts, max(queries), scale, TileLists(), causal)
        saved = q, k, v, out, lse, *starts
        limits = max(queries), max(keys), scale, causal
        runs = [gradients(False, saved, *limits, TileLists(), dout) for _ in range(21)]
        theirs = gradients(True, saved, *limits, TileLists(), dout) if case in AS_OLD else runs[0]
        wanted = []
        for dtype in (torch.float64, torch.bfloat16):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            made_by = definition(*leaves, queries, keys, scale, causal, dtype)[0]
            wanted.append([x.nan_to_num() for x in torch.autograd.grad(made_by, leaves, dout.to(dtype))])
        exact, other = wanted
        ratio = max(
            ((a.double() - e).norm() / (b.double() - e).norm()).item() for a, b, e in zip(runs[0], other, exact)
        )
        same = all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))
        as_old = all(torch.equal(a, b) for a, b in zip(theirs, runs[0]))
        finite = all(bool(torch.isfinite(x).all()) for x in runs[0])
        print(json.dumps([case, ratio <= 1.5 and same and finite, round(ratio, 3), 0, same, as_old]), flush=True)


def time_backward(width, shape, lengths):
    """TFLOP/s of the whole backward pass, microseconds of its parts, old / new, and cuDNN."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benthic.kernels.tile_lists import TileLists

    value, tokens, scale, longest, lists = DIMS[width], sum(lengths), width**-0.5, max(lengths), TileLists()
    made = lambda w: torch.randn(tokens, HEADS, w, device="cuda").to(torch.bfloat16)  # noqa: E731
    q, k, v, dout = made(width), made(width), made(value), made(value)
    starts = starts_of(lengths)
    out, lse = attend(variant("old")[0], q, k, v, (starts, starts), longest, scale, lists)
    saved, limits = (q, k, v, out, lse, starts, starts), (longest, longest, scale, True, lists)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    operands = (q, k, v, dout, lse, backward(False).deltas(out, dout), starts, starts)

    def part(old, which):
        module = backward(old)
        described = module._described(operands, causal=True)
        if which == "dq":
            module.write_query_gradient(grads[0], operands, described, longest, scale, lists)
        else:
            module.write_key_gradients(*grads[1:], operands, described, longest, scale, lists)

    calls = {}
    for old in (True, False):
        tag = "old" if old else "new"
        calls[f"all {tag}"] = lambda old=old: gradients(old, saved, *limits, dout)
        for which in ("dq", "dkv"):
            calls[f"{which} {tag}"] = lambda old=old, which=which: part(old, which)
    if len(set(lengths)) == 1:
        leaves = [
            x.view(len(lengths), longest, HEADS, -1).transpose(1, 2).detach().requires_grad_() for x in (q, k, v)
        ]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            theirs = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
        batched = dout.view(len(lengths), longest, HEADS, -1).transpose(1, 2)
        calls["all cudnn"] = lambda: torch.autograd.grad(theirs, leaves, batched, retain_graph=True)
    found = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(7):
        for name, call in calls.items():
            found[name].append(timed(call, 3))
    work = 2.5 * HEADS * sum(n * n for n in lengths) * (width + value)
    middle = {name: statistics.median(ms) for name, ms in found.items()}
    cells = (f"{n} {work / m / 1e9:.0f} TF" if n.startswith("all") else f"{n} {m * 1e3:.0f} us" for n, m in middle.items())
    print(f"backward ({width},{value}) {shape}:", ", ".join(cells), flush=True)


def timed(call, calls):
    import torch

    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / calls


def timing(right, until):
    """TFLOP/s of each right variant and cuDNN, a line a shape."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benthic.kernels.tile_lists import TileLists

    modules = {name: variant(name) for name in VARIANTS}
    for width, value in DIMS.items():
        for shape, lengths in SHAPES.items():
            if time.time() > until:
                print(width, shape, "no time left", flush=True)
                continue
            tokens, scale, longest = sum(lengths), width**-0.5, max(lengths)
            q, k, v = (torch.randn(tokens, HEADS, w, device="cuda").to(torch.bfloat16) for w in (width, width, value))
            starts = starts_of(lengths)
            lists = {name: TileLists() for name in VARIANTS}

            def ours(name):
                module, choose = modules[name]
                choose()
                attend(module, q, k, v, (starts, starts), longest, scale, lists[name])

            calls = {name: lambda name=name: ours(name) for name in right[str(width)]}
            if width == 192:
                calls.pop("turn1", None)  # is turn
            if len(set(lengths)) == 1:
                batch = [x.view(len(lengths), longest, HEADS, -1).transpose(1, 2) for x in (q, k, v)]

                def cudnn():
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
                        scaled_dot_product_attention(*batch, is_causal=True, scale=scale)

                calls["cudnn"] = cudnn
            found = {name: [] for name in calls}
            for call in calls.values():
                call()
            for at in range(9):
                names = list(calls)[at % len(calls) :] + list(calls)[: at % len(calls)]
                for name in names:
                    found[name].append(timed(calls[name], 4))
            work = HEADS * sum(n * n for n in lengths) * (width + value)
            line = " ".join(f"{n} {work / statistics.median(ms) / 1e9:.0f}" for n, ms in found.items())
            print(f"({width},{value}) {shape}: {line}", flush=True)
    for width in DIMS:
        for shape in ("4x4096", "1x16384", "pack"):
            if time.time() > until:
                print("backward", width, shape, "no time left", flush=True)
            elif right.get(f"backward {width}"):
                time_backward(width, shape, SHAPES[shape])


def checked(what, case, path):
    """In a child: lines of a check go to a file."""
    with open(path, "w") as sys.stdout:
        try:
            name, width = what
            check_backward(width, case) if name == "backward" else check(name, width, case)
        except BaseException as error:  # noqa: BLE001
            print(json.dumps([f"{case}: {type(error).__name__} {str(error)[:120]}", False, 0, 0, True, True]))


def check_all(until):
    """Check every variant, each case in a child of its own; those that are right, by heads."""
    import tempfile
    from multiprocessing import get_context

    import torch  # once for all children, which start CUDA themselves

    import benthic.kernels.gluon_attention  # noqa: F401

    right, fork, folder = {str(width): ["old"] for width in DIMS}, get_context("spawn" if torch.cuda.is_initialized() else "fork"), tempfile.mkdtemp()
    children = []
    for name, width, cases in WANTED:
        for case in cases:
            path = os.path.join(folder, f"{name}{width}{case}")
            children.append(fork.Process(target=checked, args=((name, width), case, path)))
            children[-1].start()
    for child in children:
        child.join(max(until - time.time(), 0.1))
        if child.is_alive():
            child.kill()
    for name, width, cases in WANTED:
        lines = []
        for case in cases:
            with open(os.path.join(folder, f"{name}{width}{case}")) as file:
                found = [json.loads(line) for line in file if line.startswith("[")]
            lines += found or [[f"{case}: no answer", False, 0, 0, True, True]]
        bad = [line[0] for line in lines if not line[1]]
        if not bad and name == "backward":
            right[f"backward {width}"] = True
        elif not bad:
            right[str(width)].append(name)
        worst, off = (max(line[i] for line in lines) for i in (2, 3))
        bits = "bits repeat" if all(line[4] for line in lines) else "BITS DIFFER"
        old = "bits as old" if all(line[5] for line in lines) else "bits not as old"
        print(f"{name} ({width},128) {f'WRONG {bad}' if bad else 'right'}: {worst} of torch's error, lse {off:.0e}, {bits}, {old}", flush=True)
    return right


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--time")
    parser.add_argument("--until", type=float)
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--skip-checks", action="store_true")
    options = parser.parse_args()
    if options.time:
        return timing(json.loads(options.time), options.until)
    began = time.time()
    if options.skip_checks:
        right = {str(width): list(VARIANTS) for width in DIMS} | {f"backward {width}": True for width in DIMS}
    else:
        right = check_all(began + options.seconds * 0.6)
    print(f"checked in {time.time() - began:.0f} s", flush=True)
    until = began + options.seconds
    subprocess.run([sys.executable, os.path.abspath(__file__), "--time", json.dumps(right), "--until", str(until)], timeout=max(until + 10 - time.time(), 5))
    print(f"done in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
