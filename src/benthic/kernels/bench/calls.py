"""Calls of an op by each implementation that takes them: checked against the definition, then timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benthic.errors import BackendError
from benthic.kernels import ops
from benthic.kernels.bench.timing import Bench, Make, relative

if TYPE_CHECKING:
    from collections.abc import Callable


def trying(run: Callable[..., Any], *operands: Any) -> Callable[[str], Any]:
    """A call that wants only an implementation's name."""
    return lambda impl: run(impl, *operands)


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


def forward_backward(  # noqa: PLR0913 (one argument per column)
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


def ends_of(experts: int, rows: int, device: torch.device | str, *, drawn: bool) -> torch.Tensor:
    """Where rows of experts end, int32 [experts]: `rows` for each, or as many in all that choose at random.

    The seed is fixed.
    """
    counts = torch.full((experts,), rows)
    if drawn:
        generator = torch.Generator().manual_seed(rows)
        chosen = torch.randint(experts, (experts * rows,), generator=generator)
        counts = torch.bincount(chosen, minlength=experts)
    return counts.cumsum(0).to(torch.int32).to(device)
