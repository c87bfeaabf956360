"""Drawing tokens, beside the definition and what others do by torch: one of the suites."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.kernels.bench.timing import Bench

VOCAB = 163_840


def sampling(bench: Bench) -> None:
    """Bytes of the logits a second; the error is the share of rows that draw another token."""
    vocab = 1000 if bench.small else VOCAB
    for rows in (2,) if bench.small else (1, 64, 256):
        for name, share in (("temperature", 1.0), ("top-p 0.95", 0.95)):
            _lines(bench, f"{name}, {rows} rows of {vocab}", rows, vocab, share)


def _lines(bench: Bench, shape: str, rows: int, vocab: int, share: float) -> None:
    one = torch.ones(rows, device=bench.device)
    seed = torch.arange(rows, device=bench.device)
    whole = torch.full((rows,), vocab, device=bench.device)
    filters = None if share == 1.0 else ops.Filters(0 * one, whole, share * one, vocab, some_top_k=False)
    size = rows * vocab * bench.dtype.itemsize

    def draw(impl: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: ops.draw_tokens(x, 0.6 * one, seed, seed, filters, impl=impl)

    with torch.no_grad():
        sets = bench.sets(lambda i: (3 * bench.random(rows, vocab, seed=i),), size)
        exact = draw("reference")(*sets[0])
        for impl in ("triton", "reference") if bench.device == "cuda" else ("reference",):
            error = (draw(impl)(*sets[0]) != exact).float().mean().item()
            bench.add("draw_tokens", shape, impl, bench.time(draw(impl), sets), size, "TB/s", error)
        seconds = bench.time(lambda x: _race(x / 0.6, share), sets)
        bench.add("draw_tokens", shape, "torch (peer)", seconds, size, "TB/s", None)


def _race(logits: torch.Tensor, share: float) -> torch.Tensor:
    """As vLLM without FlashInfer: sort and cut, then the first of exponential clocks at these rates."""
    logits = logits.float()
    if share < 1.0:
        ascending, order = logits.sort(dim=-1)
        ascending[ascending.softmax(-1).cumsum(-1) <= 1 - share] = -torch.inf
        logits = logits.scatter(-1, order, ascending)
    probs = logits.softmax(-1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)
