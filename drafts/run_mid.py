"""Experts' bfloat16 products of some dozens of rows on an H200: values, then times. python drafts/run_mid.py

One H200, within 60 s (it stops by itself at --until, 57). Values first: against float64, NaN around, 20 equal replays of a
graph. Then microseconds and TB/s of weights of few_rows (as it is and in other tilings), gluon_mid and
gluon_grouped, in turns; then both products of a layer one after another, alone and beside shared experts.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import statistics
import time

import torch

START = time.time()
EXPERTS, HIDDEN, FFN = 64, 2048, 1408
AVERAGES = (24, 16, 32, 48, 64, 8)
DEVICE = "cuda"


def sizes_of(average, spread=0.3, seed=0):
    """Rows of each expert: as a router's, some twice the average and some a third."""
    g = torch.Generator().manual_seed(seed + average)
    chance = torch.exp(spread * torch.randn(EXPERTS, generator=g))
    chosen = torch.multinomial(chance, average * EXPERTS, replacement=True, generator=g)
    return torch.bincount(chosen, minlength=EXPERTS).tolist()


def ways():
    """Each way: a name and a function of (x, weight, ends, gated)."""
    from benthic.kernels import gluon_grouped, gluon_mid, triton_few_rows

    def few(tiling=None, columns=64):
        def run(x, weight, ends, gated):
            kept = triton_few_rows.tiles, triton_few_rows.COLUMNS
            if tiling:
                triton_few_rows.tiles = lambda *_: tiling
            triton_few_rows.COLUMNS = columns
            try:
                return (triton_few_rows.grouped_swiglu if gated else triton_few_rows.grouped_linear)(x, weight, ends)
            finally:
                triton_few_rows.tiles, triton_few_rows.COLUMNS = kept

        return run

    def mid(tall, together):
        return lambda x, w, e, gated: gluon_mid.multiply(x, w, e, gated=gated, tall=tall, together=together)

    def grouped(x, w, e, gated):
        return gluon_grouped.grouped_swiglu(x, w, e) if gated else gluon_grouped.multiply(x, w.transpose(1, 2), e)

    return {
        "few": few(),
        "few32x128x4": few((32, 128, 4)),
        "few64x64x6": few((64, 64, 6)),
        "few128:64x64x4": few((64, 64, 4), 128),
        "mid64/2": mid(64, 2),
        "mid64/1": mid(64, 1),
        "mid128/2": mid(128, 2),
        "mid128/1": mid(128, 1),
        "grouped": grouped,
    }


def made(gated, seed=0):
    n, k = (2 * FFN, HIDDEN) if gated else (HIDDEN, FFN)
    torch.manual_seed(seed)
    return torch.randn(EXPERTS, n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5


def ends_of(sizes):
    return torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def compile_one(task):
    """Compile a form in a process of its own, for Triton's cache on disk."""
    name, gated, average = task
    try:
        n, k = (2 * FFN, HIDDEN) if gated else (HIDDEN, FFN)
        weight = torch.zeros(EXPERTS, n, k, device=DEVICE, dtype=torch.bfloat16)
        from benthic.kernels.launch import in_turn

        sizes = [average] * EXPERTS
        for spare in (0, 70) if name == "few" else (0,):  # few_rows is compiled anew for rows of no 16
            x = torch.zeros(sum(sizes) + spare, k, device=DEVICE, dtype=torch.bfloat16)
            ways()[name](x, weight, ends_of(sizes), gated)
        if name.startswith("mid"):
            with in_turn():
                ways()[name](x, weight, ends_of(sizes), gated)
        torch.cuda.synchronize()
    except Exception as error:  # told, and the others go on
        return f"{task}: {type(error).__name__} {str(error)[:160]}"
    return None


def exact_of(x, weight, sizes, gated):
    """In float64; sums are rounded to bfloat16 before SwiGLU."""
    out, first = [], 0
    for size, own in zip(sizes, weight, strict=True):
        sums = x[first : first + size].double() @ own.double().T
        if gated:
            gate, up = sums.bfloat16().double().chunk(2, dim=1)
            sums = torch.nn.functional.silu(gate) * up
        out.append(sums)
        first += size
    spare = torch.zeros(len(x) - first, out[0].shape[1], device=DEVICE, dtype=torch.float64)
    return torch.cat([*out, spare])


def record(body, count=1):
    """A graph of `count` calls, and what the last returned."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            out = body(i)
    return graph, out


def check(weights, until):
    """Values of every form of gluon_mid, beside few_rows' bits."""
    from benthic.kernels.launch import in_turn

    known = ways()
    cases = [(f"~{average}", sizes_of(average)) for average in AVERAGES]
    cases += [
        ("empty", [0 if e % 3 else 60 for e in range(EXPERTS)]),
        ("large", [700 if e == 5 else 129 if e == 40 else e % 30 for e in range(EXPERTS)]),
        ("first empty", [0] * 40 + [24] * 24),
        ("one row", [0] * 63 + [1]),
    ]
    failed = 0
    for label, sizes in cases:
        for gated in (True, False):
            if time.time() - START > until:
                print("no time for more values")
                return
            weight, spare = weights[gated][0], 70
            x = torch.randn(sum(sizes) + spare, weight.shape[2], device=DEVICE, dtype=torch.bfloat16)
            x[sum(sizes) :] = torch.nan
            ends, exact = ends_of(sizes), exact_of(x, weight, sizes, gated)
            bound = exact.abs() * 2.0 ** (-6 if gated else -8) + 0.01 * exact.abs().mean() + 1e-6
            before = known["few"](x, weight, ends, gated)
            said = []
            for name in ("mid64/2", "mid64/1", "mid128/2", "mid128/1"):
                with in_turn():
                    plain = known[name](x, weight, ends, gated).clone()
                graph, out = record(lambda _, name=name: known[name](x, weight, ends, gated))
                worst, same = 0.0, True
                for _ in range(20):
                    out.fill_(torch.nan)
                    graph.replay()
                    same &= torch.equal(out, plain)
                worst = ((plain.double() - exact).abs() / bound).nan_to_num(torch.inf).max().item()
                good = same and worst <= 1 and not plain[sum(sizes) :].any()
                failed += not good
                said.append(f"{name} {'ok' if good else 'WRONG'} {worst:.2f}{'' if same else ' differs'}"
                            f"{'=' if torch.equal(plain, before) else '~'}few")
            print(f"{label} {'swiglu' if gated else 'plain'}: " + ", ".join(said), flush=True)
    print("VALUES", "all right" if not failed else f"{failed} WRONG", f"{time.time() - START:.0f} s", flush=True)


def timed(graphs, count, turns=7):
    """Median microseconds of a call of each, in turns."""
    taken = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(turns):
        for name, graph in graphs.items():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            taken[name].append(first.elapsed_time(last) * 1000 / count)
    return {name: statistics.median(each) for name, each in taken.items()}


def products(weights, until):
    known, count = ways(), 20
    for average in AVERAGES:
        sizes = sizes_of(average)
        for gated in (True, False):
            if time.time() - START > until:
                print("no time for more products")
                return
            own = weights[gated]
            xs = [torch.randn(sum(sizes), own[0].shape[2], device=DEVICE, dtype=torch.bfloat16) for _ in own]
            ends, graphs, kept = ends_of(sizes), {}, []
            for name, run in known.items():
                if name.startswith("few") and average > 48:
                    continue
                try:
                    body = lambda i, run=run: run(xs[i % len(own)], own[i % len(own)], ends, gated)  # noqa: E731
                    graphs[name], out = record(body, count)
                    kept.append(out)
                except Exception as error:
                    print(f"{name} {average}: {type(error).__name__} {str(error)[:120]}")
            read = own[0].numel() * 2
            said = [f"{name} {us:.1f} ({read / us / 1e6:.2f})" for name, us in timed(graphs, count).items()]
            print(f"~{average} (max {max(sizes)}) {'swiglu' if gated else 'plain'}: " + ", ".join(said), flush=True)


def layers(weights, until):
    """Both products as a layer has them, alone and beside shared experts on a second stream."""
    from torch.nn.functional import linear

    known, count, side = ways(), 20, torch.cuda.Stream()
    up, down = (torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for n, k in ((4 * FFN, HIDDEN), (HIDDEN, 2 * FFN)))
    for tokens in (256, 192, 512):
        sizes = sizes_of(tokens * 6 // EXPERTS)
        ends = ends_of(sizes)
        source = torch.randn(sum(sizes), HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        dense = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        for shared in (False, True):
            if time.time() - START > until:
                print("no time for more layers")
                return
            graphs, kept = {}, []
            for name in ("few", "mid64/2", "mid64/1", "mid128/2"):

                def layer(i, run=known[name], shared=shared, ends=ends, source=source, dense=dense):
                    main = torch.cuda.current_stream()
                    x = source + 1  # a kernel ahead that is not ours
                    if shared:
                        side.wait_stream(main)
                        with torch.cuda.stream(side):
                            gate, rest = linear(dense, up).chunk(2, dim=1)
                            beside = linear(gate * rest, down)
                            kept.append(beside)
                    out = run(run(x, weights[True][i % 2], ends, True), weights[False][i % 2], ends, False)
                    if shared:
                        main.wait_stream(side)
                    return out

                graphs[name], out = record(layer, count)
                kept.append(out)
            said = [f"{name} {us:.1f}" for name, us in timed(graphs, count).items()]
            print(f"layer of {tokens}{' beside shared' if shared else ''}: " + ", ".join(said), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", type=float, default=57)
    until = parser.parse_args().until
    names = list(ways())
    # few_rows has a tile for each of three averages; the others' forms do not follow from it
    tasks = [(name, gated, average) for gated in (True, False) for name in names
             for average in ((8, 16, 24) if name == "few" else (24,))]  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(12, mp_context=spawn) as pool:
        for error in pool.map(compile_one, tasks):
            if error:
                print("COMPILE", error, flush=True)
    print(f"compiled {len(tasks)} forms, {time.time() - START:.0f} s", flush=True)
    weights = {gated: [made(gated, seed) for seed in range(2)] for gated in (True, False)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for part, share in ((check, 0.6), (products, 0.85), (layers, 1.0)):
            try:
                part(weights, until * share)
            except Exception as error:
                print(f"{part.__name__} broke: {type(error).__name__} {str(error)[:300]}", flush=True)
    print(f"end {time.time() - START:.0f} s")


if __name__ == "__main__":
    main()
