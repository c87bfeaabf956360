"""Check, then time, every op beside its peers: `python benchmarks/kernels.py --out results.json`.

Each line is first compared with the definition (on a slice that the definition can hold), then timed with
random data in rotating buffers larger than the cache: medians of CUDA events on a GPU, of a clock on a CPU.
Roofs (copy bandwidth, bfloat16 product) are measured in the same run. `--small` runs everything on tiny
sizes as a rehearsal.

Attention FLOPs: 2 h s^2 (d_qk + d_v) a sequence, halved when causal; backward counts 2.5 times that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from provenance import write_result
from sampling import sampling
from timing import WORST_ERROR, Bench, Make, relative

from benthic.errors import BackendError
from benthic.kernels import ops

if TYPE_CHECKING:
    from collections.abc import Callable


def implementations(op: str, case_runs: Callable[[str], Any]) -> list[str]:
    """Names of the implementations of an op that infer here; the definition only when nothing else does."""
    names = []
    for implementation in ops.IMPLEMENTATIONS[op][:-1]:
        with torch.no_grad():
            runs = accepted(case_runs, implementation.name)
        if runs:
            names.append(implementation.name)
    return names or ["reference"]


def accepted(run: Callable[..., Any], *operands: Any) -> bool:
    """Whether the table takes a call as it is, with gradients recorded or not."""
    try:
        run(*operands)
    except BackendError:
        return False
    return True


def roofs(bench: Bench) -> None:
    """Copy bandwidth and the rate of a plain product, in this run."""
    elements = (1 << 20) if bench.small else (1 << 29)
    pairs = [(bench.random(elements), torch.empty(elements, device=bench.device, dtype=bench.dtype))]
    seconds = bench.time(lambda x, y: y.copy_(x), pairs)
    moved = 2 * elements * bench.dtype.itemsize
    bench.add("roof: copy", f"{elements} elements", "torch", seconds, moved, "TB/s", None)
    n = 256 if bench.small else 8192
    seconds = bench.time(torch.mm, [(bench.random(n, n), bench.random(n, n, seed=1))])
    bench.add("roof: product", f"{n}^3", "torch", seconds, 2 * n**3, "TFLOP/s", None)


def memory_bound(bench: Bench) -> None:
    """Row-wise ops on at least 256 MB, forward and backward."""
    rows, width = (64, 256) if bench.small else (32768, 7168)
    weight = bench.random(width, seed=5)
    angle = torch.rand(rows, 32, device=bench.device)
    cases: list[tuple[str, Callable[..., Any], Make, float]] = [
        ("rms_norm", lambda impl, x: ops.rms_norm(x, weight, 1e-6, impl=impl), _rows(bench, rows, width), 2),
        (
            "add_rms_norm",
            lambda impl, x, r: ops.add_rms_norm(x, r, weight, 1e-6, impl=impl)[0],
            _rows(bench, rows, width, count=2),
            4,
        ),
        ("swiglu", lambda impl, x: ops.swiglu(x, impl=impl), _rows(bench, rows, width), 1.5),
        (
            "rope",
            lambda impl, x: ops.rope(x, angle.cos(), angle.sin(), impl=impl),
            _rows(bench, rows, width // 64, 64),
            2,
        ),
    ]
    for name, run, make, passes in cases:
        size = rows * width * bench.dtype.itemsize
        for impl in implementations(name, lambda impl, run=run, make=make: run(impl, *make(0))):
            _forward_backward(bench, name, f"{rows}x{width}", impl, run, make, size * passes, "TB/s")
    if bench.device == "cuda":
        norm = lambda _, x: F.rms_norm(x, (width,), weight, 1e-6)  # noqa: E731 (a peer in one line)
        _forward_backward(
            bench, "rms_norm", f"{rows}x{width}", "torch (peer)", norm, _rows(bench, rows, width),
            2 * rows * width * bench.dtype.itemsize, "TB/s",
        )  # fmt: skip


def _rows(bench: Bench, *shape: int, count: int = 1) -> Make:
    return lambda seed: tuple(bench.random(*shape, seed=seed * 10 + i, grad=True) for i in range(count))


def _forward_backward(  # noqa: PLR0913 (one argument per column)
    bench: Bench, op: str, shape: str, impl: str, run: Callable[..., Any], make: Make, work: float, unit: str,
    *, backward: float = 1.5, checked: bool = False,
) -> None:  # fmt: skip
    """Check against the definition, then time forward and backward (`backward` times the work of forward).

    An implementation for inference alone has no line for backward.
    """
    operands = make(0)
    with torch.no_grad():
        error = None if checked else relative(run(impl, *operands), run("reference", *operands))
    sets = bench.sets(make, sum(x.nbytes for x in operands))
    with torch.no_grad():
        seconds = bench.time(lambda *x: run(impl, *x), sets)
    bench.add(op, shape, impl, seconds, work, unit, error)
    if not accepted(run, impl, *operands):
        return
    graphs = []
    for operand in sets:
        out = run(impl, *operand)
        leaves = [x for x in operand if x.requires_grad]
        graphs.append((out, leaves, torch.randn_like(out)))
    seconds = bench.time(lambda o, leaves, g: torch.autograd.grad(o, leaves, g, retain_graph=True), graphs)
    bench.add(f"{op} backward", shape, impl, seconds, work * backward, unit, None)


def attention(bench: Bench) -> None:
    """Packed causal and full attention; a ragged pack of the same tokens; FlashAttention-2 as a peer."""
    sizes = [(2, 128)] if bench.small else [(4, 4096), (1, 16384)]
    heads = 2 if bench.small else 16
    for (sequences, length), (d, v), causal in itertools.product(
        sizes, [(128, 128), (192, 128)], [True, False]
    ):
        work = 2 * heads * sequences * length**2 * (d + v) / (2 if causal else 1)
        shape = f"b{sequences} s{length} h{heads} ({d},{v}) {'causal' if causal else 'full'}"
        make = _heads(bench, sequences * length, heads, d, v)
        run = _packed([length] * sequences, causal=causal, device=bench.device)
        _check_attention(bench, heads, d, v, causal=causal)
        for impl in implementations("attention", lambda impl, run=run, make=make: run(impl, *make(0))):
            _forward_backward(
                bench, "attention", shape, impl, run, make, work, "TFLOP/s", backward=2.5, checked=True
            )
        if bench.device == "cuda" and d == v:
            peer = _flash_2(sequences, causal=causal)
            _forward_backward(
                bench,
                "attention",
                shape,
                "sdpa FA2 (peer)",
                peer,
                make,
                work,
                "TFLOP/s",
                backward=2.5,
                checked=True,
            )
    lengths = [60, 4, 33, 31] if bench.small else [7000, 1, 129, 3000, 4096, 2158]
    for d, v in [(128, 128), (192, 128)]:
        work = sum(heads * length**2 * (d + v) for length in lengths)
        make = _heads(bench, sum(lengths), heads, d, v)
        run = _packed(lengths, causal=True, device=bench.device)
        shape = f"ragged {sum(lengths)} h{heads} ({d},{v}) causal"
        for impl in implementations("attention", lambda impl, run=run, make=make: run(impl, *make(0))):
            _forward_backward(
                bench, "attention", shape, impl, run, make, work, "TFLOP/s", backward=2.5, checked=True
            )


def _heads(bench: Bench, tokens: int, heads: int, d: int, v: int) -> Make:
    return lambda seed: tuple(
        bench.random(tokens, heads, width, seed=seed * 10 + i, grad=True) for i, width in enumerate((d, d, v))
    )


def _packed(lengths: list[int], *, causal: bool, device: str) -> Callable[..., torch.Tensor]:
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def run(impl: str | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.attention(
            q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, scale=q.shape[-1] ** -0.5,
            causal=causal, impl=impl,
        )  # fmt: skip

    return run


def _flash_2(sequences: int, *, causal: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(_impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def _check_attention(bench: Bench, heads: int, d: int, v: int, *, causal: bool) -> None:
    """Every implementation, values and the gradients that it takes part in, on two short sequences."""
    run = _packed([128, 128], causal=causal, device=bench.device)
    inputs = _heads(bench, 256, heads, d, v)(0)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = run("reference", *wide)
    seed = torch.randn_like(exact)
    expected = [exact, *torch.autograd.grad(exact, wide, seed)]
    for impl in implementations("attention", lambda impl: run(impl, *inputs)):
        with torch.set_grad_enabled(accepted(run, impl, *inputs)):
            out = run(impl, *inputs)
        grads = torch.autograd.grad(out, inputs, seed.to(out.dtype)) if out.requires_grad else ()
        errors = [relative(fast, slow) for fast, slow in zip([out, *grads], expected, strict=False)]
        if not max(errors) <= WORST_ERROR:
            msg = f"attention {impl} ({d}, {v}): errors {errors} of out, dq, dk, dv exceed {WORST_ERROR}"
            raise SystemExit(msg)


def decode(bench: Bench) -> None:
    """Paged absorbed decode: bytes of the cache a second, and FLOPs."""
    batches = [(2, 100)] if bench.small else [(64, 4096), (128, 4096), (256, 8192)]
    for heads, (sequences, context) in itertools.product([16] if bench.small else [16, 64, 128], batches):
        pages = -(-context // 64)
        cache = bench.random(sequences * pages, 64, 576)
        table = torch.randperm(sequences * pages, device=bench.device).view(sequences, pages).to(torch.int32)
        contexts = torch.full((sequences,), context, dtype=torch.int32, device=bench.device)
        query = bench.random(sequences, 1, heads, 576, seed=1)

        def run(impl: str, q: torch.Tensor, cache=cache, table=table, contexts=contexts) -> torch.Tensor:
            parts = q[..., :512], q[..., 512:]
            return ops.mla_decode(*parts, cache, table, contexts, scale=0.07, impl=impl)

        for impl in implementations("mla_decode", lambda impl, run=run, query=query: run(impl, query)):
            few = slice(0, 2)
            exact = ops.mla_decode(
                query[few, ..., :512].double(), query[few, ..., 512:].double(), cache.double() if
                bench.small else cache, table[few], contexts[few], scale=0.07, impl="reference",
            )  # fmt: skip
            error = relative(run(impl, query)[few], exact)
            seconds = bench.time(lambda q, run=run, impl=impl: run(impl, q), [(query,)])
            shape = f"{sequences} x {context}, {heads} heads"
            moved = sequences * context * 576 * bench.dtype.itemsize
            bench.add("mla_decode", shape, impl, seconds, moved, "TB/s", error)
            flops = 2 * sequences * context * heads * (576 + 512)
            bench.add("mla_decode", shape, impl, seconds, flops, "TFLOP/s", error)


def experts(bench: Bench) -> None:
    """Grouped products at the shapes of V3 and Moonlight, with permute and unpermute."""
    shapes = [(4, 32, 64, 32)] if bench.small else [
        (8, 4096, 7168, 4096), (8, 4096, 2048, 7168), (32, 256, 7168, 4096), (64, 768, 2048, 2816), (64,
        768, 1408, 2048), (64, 6, 2048, 2816), (64, 6, 1408, 2048),
    ]  # fmt: skip
    for count, rows, width, out in shapes:
        ends = (torch.arange(1, count + 1, device=bench.device) * rows).to(torch.int32)

        def make(seed: int, count=count, rows=rows, width=width, out=out) -> tuple[torch.Tensor, ...]:
            x = bench.random(count * rows, width, seed=seed, grad=True)
            return x, bench.random(count, out, width, seed=seed + 1, grad=True)

        def run(impl: str, x: torch.Tensor, weight: torch.Tensor, ends=ends) -> torch.Tensor:
            return ops.grouped_linear(x, weight, ends, impl=impl)

        work = 2 * count * rows * width * out
        for impl in implementations("grouped_linear", lambda impl, run=run, make=make: run(impl, *make(0))):
            _forward_backward(
                bench, "grouped_linear", f"{count}x{rows} ({width}->{out})", impl, run, make, work, "TFLOP/s",
                backward=2,
            )  # fmt: skip
    tokens, width, top_k = (64, 64, 2) if bench.small else (16384, 7168, 8)
    expert = torch.rand(tokens, 64, device=bench.device).topk(top_k).indices.to(torch.int32)
    weight = torch.rand(tokens, top_k, device=bench.device)
    maps = ops.permute(bench.random(tokens, 8), expert, 64, impl="reference").maps
    row = width * bench.dtype.itemsize * tokens
    for impl in implementations(
        "unpermute", lambda impl: ops.unpermute(bench.random(tokens * top_k, 8), maps, weight, impl=impl)
    ):
        make = _rows(bench, tokens * top_k, width)
        _forward_backward(
            bench, "unpermute", f"{tokens} x {top_k} x {width}", impl,
            lambda impl, x: ops.unpermute(x, maps, weight, impl=impl), make, row * (top_k + 1), "TB/s",
            backward=(2 * top_k + 1) / (top_k + 1),
        )  # fmt: skip
        _forward_backward(
            bench, "permute (with sort)", f"{tokens} x {top_k} x {width}", impl,
            lambda impl, x: ops.permute(x, expert, 64, impl=impl).rows_RD, _rows(bench, tokens, width),
            row * (top_k + 1), "TB/s", backward=1,
        )  # fmt: skip


def copies(bench: Bench) -> None:
    """What an expert-parallel rank of 8 does with its tokens: about 1.5 of 8 copies of each are here."""
    tokens, width, top_k = (64, 64, 8) if bench.small else (16384, 7168, 8)
    here = torch.rand(tokens, top_k, device=bench.device) < 1.5 / top_k
    row_AK = torch.where(here, here.flatten().cumsum(0).view_as(here) - 1, -1)
    copy_R = here.flatten().nonzero().squeeze(1)
    weight = torch.rand(tokens, top_k, device=bench.device)
    ends = torch.tensor([len(copy_R)], dtype=torch.int32, device=bench.device)
    row, rows = width * bench.dtype.itemsize, len(copy_R)
    dout = bench.random(tokens, width, seed=3)
    cases: list[tuple[str, Callable[..., Any], int, float]] = [
        (
            "gather_copies",
            lambda impl, x: ops.gather_copies(x, copy_R, ends, top_k=top_k, impl=impl),
            tokens,
            row * 2 * rows,
        ),
        (
            "sum_copies",
            lambda impl, x: ops.sum_copies(x, row_AK, weight, impl=impl),
            rows,
            row * (rows + tokens),
        ),
        (
            "sum_copies_backward",
            lambda impl, x: ops.sum_copies_backward(dout, x, row_AK, weight, impl=impl)[0],
            rows,
            row * (2 * rows + tokens),
        ),
    ]
    for name, run, count, moved in cases:
        operands = bench.sets(lambda seed, count=count: (bench.random(count, width, seed=seed),), moved)
        for impl in implementations(name, lambda impl, run=run, x=operands[0][0]: run(impl, x)):
            error = relative(run(impl, operands[0][0]), run("reference", operands[0][0]))
            seconds = bench.time(lambda x, run=run, impl=impl: run(impl, x), operands)
            bench.add(name, f"{tokens} x {width}, {rows} copies", impl, seconds, moved, "TB/s", error)


def head(bench: Bench) -> None:
    """Linear and cross-entropy without the logits matrix: three products' FLOPs, though four are done."""
    tokens, width, vocabulary = (64, 32, 500) if bench.small else (8192, 2048, 163840)
    target = torch.randint(vocabulary, (tokens,), device=bench.device)

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        hidden = bench.random(tokens, width, seed=seed, grad=True)
        return hidden, (bench.random(vocabulary, width, seed=seed + 1) / 45).detach().requires_grad_()

    def run(impl: str, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden, weight, target, impl=impl)

    work = 2 * tokens * width * vocabulary
    for impl in ("chunked", "reference"):
        _forward_backward(
            bench, "linear_cross_entropy", f"{tokens} x {width} x {vocabulary}", impl, run, make, work,
            "TFLOP/s", backward=2,
        )  # fmt: skip


def fp8(bench: Bench) -> None:
    """Quantisers on at least 256 MB."""
    rows, width = (256, 256) if bench.small else (32768, 7168)
    for name, quantise in (("1x128", ops.quantise_fp8_rows), ("128x128", ops.quantise_fp8_blocks)):
        x = bench.random(rows, width)
        for impl in implementations("quantise_fp8", lambda impl, q=quantise, x=x: q(x, impl=impl)):
            fast, exact = (quantise(x, impl=i)[0].float() for i in (impl, "reference"))
            seconds = bench.time(lambda x, q=quantise, impl=impl: q(x, impl=impl), [(x,)])
            work = rows * width * (bench.dtype.itemsize + 1)
            bench.add(
                f"quantise {name}", f"{rows}x{width}", impl, seconds, work, "TB/s", relative(fast, exact)
            )


SUITES = (roofs, memory_bound, attention, decode, experts, copies, head, fp8, sampling)


def main() -> None:
    """Parse, run the suites, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON (default: results/kernels.json)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal, figures mean nothing")
    parser.add_argument("--only", default="", help=f"one of {', '.join(suite.__name__ for suite in SUITES)}")
    parser.add_argument("--commit", default="", help="commit to record where there is no git")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bench = Bench(device, dtype, arguments.small or device == "cpu", [])
    for suite in SUITES:
        if not arguments.only or suite.__name__ == arguments.only:
            suite(bench)
            if device == "cuda":
                torch.cuda.empty_cache()
    rows = [asdict(line) for line in bench.lines]
    settings = {"small": bench.small, "dtype": str(dtype), "commit": arguments.commit}
    path = write_result("kernels", rows, out=arguments.out, **settings)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
