"""The op table: which implementation of an op runs, decided by an explicit list and nothing else.

Every op has a tuple of implementations in order of preference. Each says of a case (device type, dtype,
static dims, whether autograd records) whether it runs there and why. The first that runs is chosen and
remembered; a caller may name another with `impl=`, and is refused with a `BackendError` when that one cannot
run. Nothing is swapped silently, also not inside an implementation: what it cannot do, its verdict refuses.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from benthic.errors import BackendError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Case(NamedTuple):
    """What a choice may depend on.

    Attributes:
        device: device type, "cpu" or "cuda".
        dtype: dtype of the op's first tensor.
        dims: sizes that never change within a model; each op's `typical_dims` has an example.
        equal: every sequence of a pack has the same length, for ops to which that matters.
        grad: autograd records the call, so a gradient may be asked for.
        mixed: the operands have several dtypes, for ops to which that matters; with a cache in E4M3, queries
            that are not in bfloat16.
        few: there are few rows for each weight, or for each cached token, for ops to which that matters.
        many: there are so many rows that tall tiles are full, or so many values that a launch which costs the
            host more pays.
        fastest: name of the implementation that is asked for, or whose tiles leave least idle, for ops to
            which that matters.
        layout: how weights or pages lie in memory, for ops to which that matters: "columns" when outputs lie
            side by side (stride 1 in the outputs' dim), "strided" when pages have gaps, else "rows".
    """

    device: str
    dtype: torch.dtype
    dims: tuple[int, ...] = ()
    equal: bool = False
    grad: bool = False
    mixed: bool = False
    few: bool = False
    many: bool = False
    fastest: str = ""
    layout: Literal["rows", "columns", "strided"] = "rows"


def device_type(x: Tensor) -> str:
    """What `x.device.type` says, four times as fast: every call of an op asks."""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


class Verdict(NamedTuple):
    """Whether an implementation runs on a case, and why (or why not)."""

    runs: bool
    reason: str


def yes(reason: str) -> Verdict:
    """The implementation runs."""
    return Verdict(runs=True, reason=reason)


def no(reason: str) -> Verdict:
    """The implementation does not run."""
    return Verdict(runs=False, reason=reason)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: what `impl=` takes.
        when: verdict on a case.
        where: "module:function"; the module is imported when the implementation is first chosen.
    """

    name: str
    when: Callable[[Case], Verdict]
    where: str

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, function = self.where.split(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


@dataclass(frozen=True)
class Op:
    """A public op.

    Attributes:
        name: of the op and of the function that callers use.
        implementations: in order of preference.
        typical_dims: an example of `dims`, for reports.
        trains: whether training asks for its gradients; reports leave those of the others out.
    """

    name: str
    implementations: tuple[Implementation, ...]
    typical_dims: tuple[int, ...] = ()
    trains: bool = True
    _chosen: dict[tuple[Case, str | None], Callable[..., Any]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def choose(self, case: Case, impl: str | None = None) -> Callable[..., Any]:
        """The function to run; a dictionary look-up after the first call of a case.

        Raises:
            BackendError: `impl` is unknown or cannot run here, or nothing can.
        """
        found = self._chosen.get((case, impl))
        if found is None:
            found = self.select(case, impl)[0].load()
            self._chosen[(case, impl)] = found
        return found

    def select(self, case: Case, impl: str | None = None) -> tuple[Implementation, str]:
        """The implementation for a case and the reason; see `choose`."""
        candidates = self.implementations if impl is None else (self._named(impl),)
        refusals = []
        for candidate in candidates:
            verdict = candidate.when(case)
            if verdict.runs:
                return candidate, verdict.reason
            refusals.append(f"{candidate.name}: {verdict.reason}")
        recorded = ", gradients recorded" if case.grad else ""
        msg = (
            f"{self.name} cannot run on {case.device} in {case.dtype} with dims {case.dims}{recorded}. "
            + "; ".join(refusals)
        )
        raise BackendError(msg)

    def _named(self, impl: str) -> Implementation:
        for candidate in self.implementations:
            if candidate.name == impl:
                return candidate
        names = [candidate.name for candidate in self.implementations]
        msg = f"{self.name} has no implementation {impl!r}. {did_you_mean(impl, names)}"
        raise BackendError(msg)


@functools.cache
def triton_refusal(device: str) -> str | None:
    """Why Triton kernels cannot run on a device type, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        return None
    return (
        None
        if triton_interprets()
        else f"Triton kernels run on cuda, not {device} (or in Triton's interpreter)"
    )


def gluon_refusal(case: Case) -> str | None:
    """Why a case is not for our Gluon kernels, which use Hopper's products of 16-bit numbers; None: it is."""
    if case.device != "cuda" or case.dtype not in (torch.bfloat16, torch.float16):
        return f"runs on cuda in bfloat16 and float16, not on {case.device} in {case.dtype}"
    return triton_refusal("cuda") or hopper_refusal()


@functools.cache
def hopper_refusal() -> str | None:
    """Why wgmma cannot run on the GPU here; None on Hopper, and where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs Hopper (sm_90), and this GPU is sm_{major}{minor}"


@functools.cache
def triton_interprets() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter in this process.

    Its own switch is read where it has not been imported: a server on a CPU never needs it.
    """
    knobs = sys.modules.get("triton.knobs")
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}  # noqa: TID251


def triton_runs(*dtypes: torch.dtype, reason: str, dot: bool = False) -> Callable[[Case], Verdict]:
    """A `when` for a Triton kernel that takes `dtypes`.

    With `dot=True` the kernel multiplies matrices: bfloat16 is then refused under the interpreter, whose
    bfloat16 products are silently wrong (errors of 1e10).
    """

    def when(case: Case) -> Verdict:
        refusal = triton_refusal(case.device)
        if refusal is not None:
            return no(refusal)
        if case.dtype not in dtypes:
            return no(f"takes {', '.join(map(str, dtypes))}, not {case.dtype}")
        if dot and case.device == "cpu" and case.dtype == torch.bfloat16:
            return no("Triton's interpreter multiplies bfloat16 matrices wrongly; use float32 there")
        return yes(reason)

    return when


def on(device: str, *dtypes: torch.dtype, reason: str) -> Callable[[Case], Verdict]:
    """A `when` for one device type, and for `dtypes` if any are named."""

    def when(case: Case) -> Verdict:
        if case.device != device:
            return no(f"runs on {device}, not {case.device}")
        if dtypes and case.dtype not in dtypes:
            return no(f"takes {', '.join(map(str, dtypes))}, not {case.dtype}")
        return yes(reason)

    return when


def inference_only(when: Callable[[Case], Verdict]) -> Callable[[Case], Verdict]:
    """`when`, but refused where autograd records: for implementations without a backward."""

    def checked(case: Case) -> Verdict:
        verdict = when(case)
        if verdict.runs and case.grad:
            return no("computes no gradients, but autograd records: call it under torch.no_grad()")
        return verdict

    return checked


def one_dtype(when: Callable[[Case], Verdict]) -> Callable[[Case], Verdict]:
    """`when`, but refused where operands have several dtypes."""

    def checked(case: Case) -> Verdict:
        verdict = when(case)
        if verdict.runs and case.mixed:
            return no(f"takes operands of one dtype, but some are not {case.dtype}")
        return verdict

    return checked


def with_few_rows(when: Callable[[Case], Verdict]) -> Callable[[Case], Verdict]:
    """`when`, but refused where there are many rows for each weight."""

    def checked(case: Case) -> Verdict:
        verdict = when(case)
        if verdict.runs and not case.few:
            return no("is made for few rows a weight")
        return verdict

    return checked


def laid_out(layout: str, when: Callable[[Case], Verdict]) -> Callable[[Case], Verdict]:
    """`when`, but refused where weights or pages do not lie in memory as `layout` says."""

    def checked(case: Case) -> Verdict:
        verdict = when(case)
        if verdict.runs and case.layout != layout:
            return no(f"takes memory laid out in {layout}, not {case.layout}")
        return verdict

    return checked


def anywhere(reason: str) -> Callable[[Case], Verdict]:
    """A `when` for every device and dtype."""
    verdict = yes(reason)

    def when(_case: Case) -> Verdict:
        return verdict

    return when


def reference(where: str) -> Implementation:
    """The plain-torch definition as the last entry of an op's list."""
    return Implementation("reference", anywhere("plain torch: the definition of the op"), where)
