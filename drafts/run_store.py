"""Keys and latents written to the cache by the kernel that makes them: the two ops' bits, then timed beside them.

    PYTHONPATH=src python3 drafts/run_store.py [checks] [times]

Rehearsal without a GPU: TRITON_INTERPRET=1 (float32, few rows, graphs replaced by calls).
Times are medians of CUDA graphs of 27 layers with operands of their own, old and new in turns.
"""

import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from unittest import mock

import torch

from benthic.kernels import ops
from benthic.kernels.launch import in_turn
from benthic.model.local import LocalExchange
from benthic.model.mla import attention_for
from benthic.model.rope import Angles
from benthic.model.sockets import Sockets
from benthic.serve.attend import DecodeRows, PagedAttend, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.few_rows import FewRowsLinear
from benthic.spec import presets

BEGAN, LIMIT = time.time(), 52
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
E4M3 = torch.float8_e4m3fn
ROWS = (1, 3, 64, 256, 4096, 5000) if ON_GPU else (1, 3, 9)  # 5000: too many to be launched early
LAYERS, REPEATS = (27, 20) if ON_GPU else (3, 2)
HEADS, NOPE, C, R = 16, 128, 512, 64


def passed():
    return f"{time.time() - BEGAN:.0f} s"


def two_ops(*operands):
    """What ran before, each by its Triton kernel."""
    *operands, into = operands
    query, key, latent = ops.rope_and_norm(*operands, impl="triton")
    ops.store_latent(into.cache_PBW, latent, key, into.slot_T, impl="triton")
    return query, *into.returned(key, latent)


def one_kernel(*operands):
    return ops.rope_norm_store(*operands, impl="triton")


def normal(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def operands_of(rows):
    """As a layer has them: parts of wider rows."""
    query = normal(rows, HEADS, NOPE + R)[..., NOPE:]
    latent, key = normal(rows, C + R).mul_(3).split((C, R), -1)
    angle = normal(rows, R // 2, dtype=torch.float32) * 50
    return query, key, latent, normal(C) + 200, 1e-6, angle.cos(), angle.sin()  # some are beyond E4M3's 448


def slots_of(rows, pages, *, gaps):
    slot = torch.randperm(pages * 64, device=DEVICE)[:rows]
    if gaps:
        slot[torch.arange(rows, device=DEVICE) % 3 == rows % 3] = -1
    return slot


def cache_of(layers, pages, kept):
    return torch.full((layers, pages, 64, C + R), torch.nan, device=DEVICE, dtype=DTYPE).to(kept)


def compile_forms():
    """All forms in processes side by side; what is compiled stays on disk."""
    forms = list(itertools.product(("as wide", "E4M3"), ("early", "in turn")))
    for process in [subprocess.Popen([sys.executable, __file__, "compile", *form]) for form in forms]:
        assert process.wait() == 0, "does not compile"
    print(f"compiled, {passed()}", flush=True)


def compile_form(kept, order):
    with in_turn() if order == "in turn" else contextlib.nullcontext():
        cache, slot, operands = cache_of(1, 2, kinds()[kept])[0], slots_of(3, 2, gaps=False), operands_of(3)
        for alone, run in itertools.product((False, True), (one_kernel, two_ops)):
            run(*operands, ops.Slots(cache, slot, alone))
        attend(one=True, rows=3, kept=kinds()[kept])


def kinds():
    return {"as wide": DTYPE, "E4M3": E4M3}


def equal(ours, theirs):
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
               for a, b in zip(ours, theirs, strict=True))  # fmt: skip


def checks():
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # what is empty is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    for rows, (name, kept) in itertools.product(ROWS, kinds().items()):
        same = right = True
        pages, operands = rows // 64 + 3, operands_of(rows)
        exact = ops.rope_and_norm(
            *(x.double() if isinstance(x, torch.Tensor) else x for x in operands), impl="reference"
        )
        worst = 0.0
        for gaps, alone in itertools.product((False, True), repeat=2):
            slot, (old, new) = slots_of(rows, pages, gaps=gaps), (cache_of(3, pages, kept) for _ in range(2))
            theirs = two_ops(*operands, ops.Slots(old[1], slot, alone))
            for repeat in range(REPEATS):
                if repeat:
                    new.copy_(cache_of(3, pages, kept))
                with in_turn() if repeat % 5 == 4 else contextlib.nullcontext():
                    ours = one_kernel(*operands, ops.Slots(new[1], slot, alone))
                same &= equal((new, *ours), (old, *theirs))
            stored = slot[slot >= 0]
            want = torch.cat((exact[2], exact[1]), 1)[slot >= 0]
            if kept is E4M3:
                want = want.clamp(-448, 448)
                found = new[1].view(torch.uint8).flatten(0, 1)[stored].view(E4M3)
            else:
                found = new[1].flatten(0, 1)[stored]
            if len(want):
                off = (found.double() - want).abs() / want.abs().clamp(min=0.02)
                worst = max(worst, float(off.max()))
            untouched = torch.ones(pages * 64, dtype=torch.bool, device=DEVICE)
            untouched[stored] = False
            right &= bool(new[1].float().flatten(0, 1)[untouched].isnan().all())
            right &= bool(new.float()[[0, 2]].isnan().all())
        bound = 0.08 if kept is E4M3 else 0.0045 if ON_GPU else 1e-4
        near = worst < bound or (kept is E4M3 and not ON_GPU)  # the interpreter rounds to E4M3 wrongly
        good = same and right and near
        print(f"{rows} rows, cache {name}: {'ok' if good else 'WRONG'} bits {same} rest {right} "
              f"off {worst:.1e}, {passed()}", flush=True)  # fmt: skip
    for rows, (name, kept) in itertools.product((3, 64) if ON_GPU else (3,), kinds().items()):
        old, new = (attend(one=one, rows=rows, kept=kept) for one in (False, True))
        print(f"attention of {rows} rows, cache {name}: {'ok' if equal(old, new) else 'WRONG'}", flush=True)
    torch._C._set_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False


@torch.inference_mode()
def attend(*, one, rows, kept):
    """A layer's attention of Moonlight in a decode step: what it gives, and the bytes of the cache."""
    torch.manual_seed(rows)
    config = presets.get("moonlight-16b-a3b")
    attention = attention_for(config, 1).to(DEVICE, DTYPE)
    for weight in attention.parameters():
        weight.copy_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02)
    cache = LatentCache(
        replace(CacheLayout.of(config, block_size=64, dtype=kept), layers=2), rows * 4 + 1, DEVICE
    )
    cache.pages_LPBW.copy_(torch.randn(cache.pages_LPBW.shape, device=DEVICE).to(kept))
    table = torch.randperm(rows * 4, device=DEVICE).view(rows, 4).int()
    context = torch.randint(1, 257, (rows,), device=DEVICE, dtype=torch.int32)
    last = context.long() - 1
    slot = table.long().gather(1, last[:, None] // 64)[:, 0] * 64 + last % 64
    angle = normal(rows, R // 2, dtype=torch.float32)
    step = StepLayout(slot, DecodeRows(1, table, context), None)
    sockets = Sockets(PagedAttend(cache, step), LocalExchange(config.n_routed_experts), FewRowsLinear())
    with contextlib.nullcontext() if one else mock.patch("benthic.kernels.ops.rope_norm_store", two_ops):
        out = attention(normal(rows, config.hidden_size), Angles(angle.cos(), angle.sin()), sockets)
    return out, cache.pages_LPBW


def captured(run):
    run()
    if not ON_GPU:
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.held = run()
    return graph.replay


def timed(runs, repeats):
    """Median microseconds of each, in turns."""
    if not ON_GPU:
        return [len(run()) / 1e3 for run in runs]
    marks = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, marks, strict=True):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run()
            pair[1].record()
            times.append(pair)
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) * 1e3 for a, b in times) for times in marks]


@torch.inference_mode()
def times():
    """The two alone, then between the products that stand round them in a decode step."""
    heads = [normal(HEADS, NOPE, C) * C**-0.5 for _ in range(LAYERS)]
    weights = [normal(HEADS * (NOPE + R), 2048) * 2048**-0.5 for _ in range(LAYERS)]
    for rows, (name, kept), among in itertools.product(
        (1, 64, 4096) if ON_GPU else (1, 3), kinds().items(), (False, True)
    ):
        if among and (rows > 64 or kept is E4M3) or time.time() - BEGAN > LIMIT:
            continue
        cache, x = cache_of(LAYERS, rows // 64 + 3, kept), normal(rows, 2048)
        layers = [operands_of(rows) for _ in range(LAYERS)]
        slot = slots_of(rows, rows // 64 + 3, gaps=False)

        def step(run, alone, *, among=among, cache=cache, x=x, layers=layers, slot=slot):
            outs = []
            for i, operands in enumerate(layers):
                into = ops.Slots(cache[i], slot, alone)
                if not among:
                    outs.append(run(*operands, into))
                    continue
                query = FewRowsLinear()(x, weights[i]).unflatten(-1, (HEADS, NOPE + R))
                outs.append(run(query[..., NOPE:], *operands[1:], into))
                outs.append(query[..., :NOPE].transpose(0, 1) @ heads[i])
            return outs

        old = captured(lambda step=step: step(two_ops, alone=False))
        new = [captured(lambda a=a, step=step: step(one_kernel, alone=a)) for a in (True, False)]
        before, alone, both = timed([old, *new], 60 if rows < 4096 else 30)
        where = "between q's product and absorb" if among else "by themselves"
        print(f"{rows} rows, cache {name}, {LAYERS} layers {where}: two {before:.1f} us, one {alone:.1f} "
              f"({before - alone:.1f} less), with tensors {both:.1f}; {passed()}", flush=True)  # fmt: skip


def main():
    torch.manual_seed(0)
    if "compile" in sys.argv:
        compile_form(*sys.argv[-2:])
        return
    if ON_GPU:
        compile_forms()
    for part in (checks, times):
        if part.__name__ in sys.argv or len(sys.argv) == 1:
            part()


if __name__ == "__main__":
    main()
