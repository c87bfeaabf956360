"""One small call of every kernel that `sanitize.py` watches, by each implementation that takes it.

Rows, experts and lengths are uneven; widths are those that Hopper's kernels take. Gradients are asked for
where an op has them. Nothing is compared: tests do that.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benthic.errors import BackendError
from benthic.kernels import ops
from benthic.kernels.ops import Fp8

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch import Tensor

ROWS, WIDTH, OUT, EXPERTS, EPS = 203, 256, 384, 4, 1e-6


class Call(NamedTuple):
    """An op by its name in the table, its function, what it is called with, and a word about that."""

    op: str
    run: Callable[..., Any]
    operands: tuple[Any, ...]
    words: dict[str, Any] = {}  # noqa: RUF012 (never written)
    what: str = ""


def make_calls(device: str, only: Collection[str] = ()) -> list[str]:
    """Make every call that runs on a device, or those of some ops: "op: implementation (what of it)"."""
    if unknown := sorted(set(only) - set(ops.IMPLEMENTATIONS)):
        msg = f"{unknown} are none of the {len(ops.IMPLEMENTATIONS)} ops; `benthic doctor` lists them."
        raise SystemExit(msg)
    torch.manual_seed(0)
    made, done = Made(device), []
    for call in itertools.chain(*(family(made) for family in (attention, experts, fp8, by_row, updates))):
        if only and call.op not in only:
            continue
        *names, definition = [implementation.name for implementation in ops.IMPLEMENTATIONS[call.op]]
        ran = [name for name in names if runs(call, name)]
        if not ran and runs(call, definition):
            ran = [definition]
        done += [f"{call.op}: {name}" + (f" ({call.what})" if call.what else "") for name in ran]
    return done


def runs(call: Call, impl: str) -> bool:
    """Make a call and ask for its gradients; False where the table refuses the implementation."""
    try:
        found = call.run(*call.operands, **call.words, impl=impl)
    except BackendError:
        return False
    outs = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, torch.Tensor)]
    outs = [x for x in outs if x.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # an error belongs to this call
    return True


class Made:
    """Operands on a device, in the dtype that its kernels are made for."""

    def __init__(self, device: str) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32

    def __call__(self, *shape: int, grad: bool = False) -> Tensor:
        """Normal random numbers."""
        return torch.randn(*shape, device=self.device).to(self.dtype).requires_grad_(grad)

    def integers(self, *values: Any) -> Tensor:
        """In 32 bits."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def ends(self, sizes: tuple[int, ...]) -> Tensor:
        """Where groups of these sizes end."""
        return self.integers(*itertools.accumulate(sizes))

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of a dtype."""
        return torch.zeros(shape, dtype=dtype, device=self.device)


def attention(made: Made) -> Iterator[Call]:
    """Packs with gradients, heads in parts, and decoding from pages."""
    for (width, value), lengths in itertools.product(((128, 128), (192, 128)), ((256, 256), (130, 1, 72))):
        starts, rows = made.ends((0, *lengths)), sum(lengths)
        operands = *(made(rows, 2, w, grad=True) for w in (width, width, value)), starts, starts
        longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths), "scale": 0.1}
        yield Call("attention", ops.attention, operands, longest, f"{width}, {lengths}")
    parts = made(203, 2, 128), made(203, 2, 64), made(203, 2, 128), made(203, 64), made(203, 2, 128)
    yield Call("attention_of_parts", ops.attention_of_parts, (*parts, starts, starts), longest)
    cache, where = made(6, 64, 576), (made.integers([4, 1, 0], [2, 3, 5]), made.integers(150, 65))
    for heads, pages in ((16, cache), (128, cache), (16, cache.to(torch.float8_e4m3fn))):
        operands = made(2, 1, heads, 512), made(2, 1, heads, 64), pages, *where
        what = f"{heads} heads, {str(pages.dtype).removeprefix('torch.')}"
        yield Call("mla_decode", ops.mla_decode, operands, {"scale": 0.1}, what)


def experts(made: Made) -> Iterator[Call]:
    """Routing, copies of rows, grouped products with gradients."""
    gate = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "top_k": 2, "n_group": 1, "topk_group": 1}
    gate |= {"norm_topk_prob": True, "routed_scaling_factor": 2.0}
    logits = torch.randn(ROWS, EXPERTS, device=made.device, requires_grad=True)
    yield Call("route", ops.route, (logits, made.zeros(EXPERTS)), gate)
    chosen = torch.rand(ROWS, EXPERTS, device=made.device).topk(2).indices.int()
    yield Call("permute", ops.permute, (made(ROWS, WIDTH, grad=True), chosen, EXPERTS))
    maps = ops.permute(made(ROWS, 8), chosen, EXPERTS, impl="reference").maps
    tiles = ops.Fp8(*ops.quantise_fp8_rows(made(ROWS, WIDTH)))
    yield Call("spread_fp8", ops.spread_fp8, (tiles, maps.row_TK), {"rows": 2 * ROWS})
    share = torch.rand(ROWS, 2, device=made.device).requires_grad_()
    yield Call("unpermute", ops.unpermute, (made(2 * ROWS, WIDTH, grad=True), maps, share))
    for sizes in ((131, 0, 7, 65), (3, 0, 1, 2)):
        ends, rows = made.ends(sizes), sum(sizes) + 5  # five belong to nobody
        x, w, dy = made(rows, WIDTH), made(EXPERTS, OUT, WIDTH), made(rows, OUT)
        into, trained = made.zeros(EXPERTS, OUT, WIDTH), [t.clone().requires_grad_() for t in (x, w)]
        yield Call("grouped_linear", ops.grouped_linear, (*trained, ends), what=f"{sizes}, training")
        for op, run, operands in (
            ("grouped_linear", ops.grouped_linear, (x, w, ends)),
            ("grouped_swiglu", ops.grouped_swiglu, (x, w, ends)),
            ("grouped_input_gradient", ops.grouped_input_gradient, (dy, w, ends)),
            ("grouped_weight_gradient", ops.weight_gradient, (dy, x, ends)),
            ("add_grouped_weight_gradient", ops.add_weight_gradient, (into, dy, x, ends)),
        ):
            yield Call(op, run, operands, what=f"{sizes}")


def fp8(made: Made) -> Iterator[Call]:
    """Quantisers, and products of what they give."""
    x, weight, sizes = made(ROWS, WIDTH), made(OUT, WIDTH), (131, 0, 7, 65)
    yield Call("quantise_fp8", ops.quantise_fp8_rows, (x,), what="rows")
    yield Call("quantise_fp8", ops.quantise_fp8_blocks, (weight,), what="blocks")
    yield Call("quantise_fp8_weight", ops.quantise_fp8_weight, (weight,))
    yield Call("swiglu_fp8", ops.swiglu_fp8, (x,))
    yield Call("swiglu_gradient_fp8_both", ops.swiglu_gradient_fp8_both, (x, made(ROWS, WIDTH // 2)))
    operands = x, made(ROWS, WIDTH // 2), torch.rand(ROWS, device=made.device)
    yield Call("weighted_swiglu_gradient", ops.weighted_swiglu_gradient, operands)
    yield Call("weighted_swiglu_gradient_fp8_both", ops.weighted_swiglu_gradient_fp8_both, operands)
    yield Call("rms_norm_fp8", ops.rms_norm_fp8, (x, made(WIDTH), EPS))
    yield Call("add_rms_norm_fp8", ops.add_rms_norm_fp8, (x, made(ROWS, WIDTH), made(WIDTH), EPS))
    for ends, prefix, rows in ((None, "", ROWS), (made.ends(sizes), "grouped_", ROWS), (None, "", 24)):
        group = () if ends is None else (EXPERTS,)
        x, dy, w = made(rows, WIDTH), made(rows, OUT), made(*group, OUT, WIDTH)
        yield Call("quantise_fp8_columns", ops.quantise_fp8_columns, (x, ends))
        yield Call("quantise_fp8_both", ops.quantise_fp8_both, (x, ends))
        tiles, blocks = Fp8(*ops.quantise_fp8_rows(x)), ops.quantise_fp8_weight(w)
        yield Call("retile_fp8", ops.retile_fp8, (tiles, ends))
        yield Call("turn_fp8", ops.turn_fp8, (blocks,))
        word, dtype = f"{rows} rows", {"dtype": made.dtype}
        yield Call(f"{prefix}fp8_linear", ops.fp8_linear, (tiles, blocks, ends), dtype, word)
        columns = [ops.quantise_fp8_columns(t, ends) for t in (dy, x)]
        yield Call(f"{prefix}fp8_weight_gradient", ops.fp8_weight_gradient, (*columns, ends), what=word)
        operands = made.zeros(*group, OUT, WIDTH), *columns, ends
        yield Call(f"add_{prefix}fp8_weight_gradient", ops.add_fp8_weight_gradient, operands, what=word)


def by_row(made: Made) -> Iterator[Call]:
    """Norms, SwiGLU, rotations, drawn tokens, the head's loss."""
    x, weight = made(ROWS, WIDTH, grad=True), made(WIDTH, grad=True)
    yield Call("rms_norm", ops.rms_norm, (x, weight, EPS))
    yield Call("add_rms_norm", ops.add_rms_norm, (x, made(ROWS, WIDTH, grad=True), weight, EPS))
    yield Call("swiglu", ops.swiglu, (x,))
    angle = torch.rand(ROWS, 32, device=made.device)
    yield Call("rope", ops.rope, (made(ROWS, 3, 64, grad=True), angle.cos(), angle.sin()))
    one, seed = torch.ones(5, device=made.device), torch.arange(5, device=made.device)
    filters = ops.Filters(0 * one, (7 * one).long(), 0.9 * one, 7, some_top_k=True)
    for kept, what in ((None, ""), (filters, "filtered")):
        yield Call("draw_tokens", ops.draw_tokens, (made(5, 3001), 0.6 * one, seed, seed, kept), what=what)
    yield Call("best_tokens", ops.best_tokens, (made(5, 5001),))
    fed, home = made.zeros(2, 3, dtype=torch.int64), made.zeros(15, dtype=torch.int64)
    lines = made.zeros(3, 3, dtype=torch.int64)
    notes = ops.Notes(home[:8], home[8:10], home[10:12], torch.arange(2, device=made.device), lines)
    yield Call("judge_greedy", ops.judge_greedy, (made(6, 5001), fed, notes))
    target = torch.randint(1000, (ROWS,), device=made.device)
    head = made(1000, WIDTH, grad=True)
    yield Call("linear_cross_entropy_sum", ops.linear_cross_entropy_sum, (x, head, target))


def updates(made: Made) -> Iterator[Call]:
    """AdamW of whole masters, of split ones, and with the FP8 copy."""
    by = ops.AdamWStep(0.9, 0.95, 1e-8, step_size=1e-4, decay=1e-5, correction=1.0)
    master, gradient = torch.randn(2, OUT, WIDTH, device=made.device).unbind()
    moments = [made.zeros(OUT, WIDTH, dtype=torch.bfloat16) for _ in range(2)]
    yield Call("adamw", ops.adamw, (master, gradient, *moments, by))
    halves = master.bfloat16(), made.zeros(OUT, WIDTH, dtype=torch.int16)
    yield Call("adamw_split", ops.adamw_split, (*halves, gradient, *moments, by))
    yield Call("adamw_fp8", ops.adamw_fp8, (master, gradient, *moments, by, ops.quantise_fp8_weight(master)))
    yield Call("accumulate", ops.accumulate, (master, made(OUT, WIDTH)))
