"""Products of decode steps of up to 8 rows, each beside the library's."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.kernels.bench.calls import implementations, trying
from benthic.kernels.bench.timing import CACHE_BYTES, Bench, relative

if TYPE_CHECKING:
    from collections.abc import Callable

# q, kv_a, o, the shared experts' gate_up and down of Moonlight: (width, columns)
SHAPES = ((2048, 3072), (2048, 576), (2048, 2048), (2048, 5632), (2816, 2048))


def products(bench: Bench) -> None:
    """Mean time of a product in a chain of them that is replayed as a graph, each with a weight of its own.

    Weights together exceed the cache.
    """
    for width, columns in [(64, 40)] if bench.small else SHAPES:
        size = width * columns * bench.dtype.itemsize
        count = 2 if bench.small else math.ceil(CACHE_BYTES / size)
        weights = [bench.random(columns, width, seed=seed) for seed in range(count)]
        for rows in (1, 2, 4, 8):
            x = bench.random(rows, width, seed=count)
            exact = ops.linear(x, weights[0], impl="reference")
            for impl in implementations("linear", trying(_product, x, weights[0])):
                error = relative(_product(impl, x, weights[0]), exact)
                chain = _recorded(partial(_chain, impl, x, weights), on_gpu=bench.device == "cuda")
                seconds = bench.time(chain, [()]) / count
                bench.add("linear", f"{rows} ({width}->{columns})", impl, seconds, size, "TB/s", error)


def _product(impl: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, weight, impl=impl)


def _chain(impl: str, x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        ops.linear(x, weight, impl=impl)


@torch.inference_mode()
def _recorded(run: Callable[[], None], *, on_gpu: bool) -> Callable[[], None]:
    """`run` as a graph, where there is a GPU to record one."""
    if not on_gpu:
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
