"""The suites of one run, on the best device there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from benthic.errors import UnknownFieldError
from benthic.kernels.bench import attention, few_rows, fp8, sampling, suites
from benthic.kernels.bench.timing import Bench

if TYPE_CHECKING:
    from collections.abc import Callable

SUITES: Final[dict[str, Callable[[Bench], None]]] = {
    "memory_bound": suites.memory_bound,
    "head_dims": suites.head_dims,
    "attention": attention.attention,
    "decode": attention.decode,
    "experts": suites.experts,
    "few_rows": few_rows.products,
    "copies": suites.copies,
    "head": suites.head,
    "fp8": fp8.quantisers,
    "fp8_fused": fp8.fused,
    "fp8_products": fp8.products,
    "update": suites.update,
    "sampling": sampling.sampling,
}


def measure(only: str | None = None, *, small: bool = False, say: Callable[[str], None] = print) -> Bench:
    """Run all suites, or one, behind the roofs of this machine; without a GPU with tiny sizes.

    `say` hears every line as it is timed.

    Raises:
        UnknownFieldError: there is no such suite.
    """
    if only is not None and only not in SUITES:
        kind = "suite"
        raise UnknownFieldError(kind, only, SUITES)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    bench = Bench("cuda" if on_gpu else "cpu", dtype, small or not on_gpu, [], say)
    suites.roofs(bench)
    for name, suite in SUITES.items():
        if only in (None, name):
            suite(bench)
            if on_gpu:
                torch.cuda.empty_cache()
    return bench


def device_name() -> str:
    """What the lines were timed on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
