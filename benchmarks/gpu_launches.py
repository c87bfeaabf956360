"""How many operators and Triton kernels the host calls for one block of a training step on a GPU.

    python benchmarks/gpu_launches.py [--list "fp8 mixture"]

Counted on torch's meta device, so that no GPU is needed: ops choose what they would choose on one, and what
would launch a Triton kernel counts instead. Counted is what torch dispatches, views and empty tensors too:
each costs the host about as much as a launch. A block's count is the difference between two blocks and one,
of the second microbatch of a step: what is made once a step is not in it. `--list` prints every call of one
case with its place in the source, and the node of autograd that made it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))

from moonlight_slices import moonlight
from provenance import write_result

from benthic.kernels.table import Op
from benthic.model.local import LocalExchange, PackedAttend
from benthic.model.products import WeightGradients
from benthic.model.rope import Angles
from benthic.model.sockets import Sockets
from benthic.parallel.chunk import Chunk, joined
from benthic.parallel.mesh import Mesh
from benthic.parallel.pipeline import Flow
from benthic.parallel.stages import build
from benthic.sched.pipeline import schedules
from benthic.spec.layout import Layout
from benthic.train.config import LoopConfig, PrecisionConfig, RunConfig
from benthic.train.losses import Objective, Tally, Weights
from benthic.train.precision import keep_weights, linear_socket
from benthic.train.recompute import recompute
from benthic.train.stage import ModelStage, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from benthic.kernels.table import Case
    from benthic.parallel.chunk import Phase

ROWS: Final = 4
SEQ_LEN: Final = 4096
PRECISIONS: Final = {
    "bf16": PrecisionConfig(weights="bfloat16", matmul="bfloat16"),
    "fp8": PrecisionConfig(weights="fp8", matmul="fp8"),
}
CASES: Final = {
    "bf16 dense": ("bf16", True),
    "bf16 mixture": ("bf16", False),
    "fp8 dense": ("fp8", True),
    "fp8 mixture": ("fp8", False),
}
META: Final = torch.device("meta")
PACKAGE: Final = str(Path(importlib.import_module("benthic").__file__ or "").parent)

aten = torch.ops.aten
WITHOUT_META: Final = (aten.mm.dtype, aten.addmm.dtype_out, aten._scaled_mm_v2.default)  # noqa: SLF001
"""Products of two matrices into another dtype, which torch has for CUDA alone, or checks wrongly without."""

Call = tuple[str, str, str]
"""Whether it is an "operator" or a "kernel", its name, and where it was called."""


class Count(TorchDispatchMode):
    """Every call so far."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(
        self, func: Any, _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Count, and do it."""
        self.calls["operator", str(func), place()] += 1
        if func in WITHOUT_META:
            return unwritten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def unwritten(*operands: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    """The output of a product in `WITHOUT_META`."""
    if out is not None:
        return out
    dtype = next(each for each in (*operands, *options.values()) if isinstance(each, torch.dtype))
    empty: Tensor = operands[0].new_empty(operands[0].shape[0], operands[1].shape[1], dtype=dtype)
    return empty


def launch(count: Count) -> Callable[..., None]:
    """What stands for the launch of a Triton kernel."""

    def run(kernel: Any, *_args: object, **_options: object) -> None:
        count.calls["kernel", kernel.fn.__name__, place()] += 1

    return run


def place() -> str:
    """The line of the package that calls, and the node of autograd if one does."""
    frame: Any = sys._getframe(1)  # noqa: SLF001 (a stack is what is asked for)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return ""
    line = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
    node = torch._C._current_autograd_node()  # noqa: SLF001 (anomaly detection asks so)
    return line if node is None else f"{line} in {node.name()}"


def main() -> None:
    """Every case; or one, call by call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", choices=CASES, help="every call of one case")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    if words.list is not None:
        for way, calls in zip(("forward", "backward"), block(*CASES[words.list]), strict=True):
            print(f"{way}: {tally(calls)}")
            for (kind, name, where), times in sorted(calls.items(), key=lambda item: item[0][2]):
                print(f"  {times:3} {kind:8} {name:44} {where}")
        return
    rows = [row(name) for name in CASES]
    print(write_result("gpu_launches", rows, out=words.out, rows_a_microbatch=ROWS, seq_len=SEQ_LEN))


def row(name: str) -> dict[str, Any]:
    """One case, printed."""
    forward, backward = (tally(calls) for calls in block(*CASES[name]))
    print(f"{name:<14} operators + kernels: forward {forward}, backward {backward}")
    found: dict[str, Any] = {"block": name}
    for way, counted in (("forward", forward), ("backward", backward)):
        found[f"{way}_operators"], found[f"{way}_kernels"] = counted
    return found


def tally(calls: Counter[Call]) -> tuple[int, int]:
    """Operators and kernels."""
    kinds: Counter[str] = Counter()
    for (kind, *_), times in calls.items():
        kinds[kind] += times
    return kinds["operator"], kinds["kernel"]


def block(precision: str, dense: bool) -> list[Counter[Call]]:  # noqa: FBT001 (a column of a table)
    """The calls of one more block, forward and backward."""
    one, two = (microbatch(PRECISIONS[precision], dense, layers) for layers in (1, 2))
    for more, fewer in zip(two, one, strict=True):
        more.subtract(fewer)
    return [+calls for calls in two]


def microbatch(precision: PrecisionConfig, dense: bool, layers: int) -> list[Counter[Call]]:  # noqa: FBT001
    """The calls of the second microbatch through some equal blocks, forward and backward."""
    count = Count()
    with (
        mock.patch.object(JITFunction, "run", launch(count)),
        mock.patch.object(Op, "choose", on_gpu(Op.choose)),
    ):
        phases = stage(precision, dense, layers)
        once(next(phases), count)
        return once(next(phases), count)


def on_gpu(choose: Any) -> Any:
    """As `Op.choose`, of a meta tensor what it would choose of one on a GPU."""

    def chosen(op: Op, case: Case, impl: str | None = None) -> Any:
        return choose(op, case._replace(device="cuda"), impl)

    return chosen


def once(phases: list[Phase], count: Count) -> list[Counter[Call]]:
    """One microbatch forward and backward."""
    entering = torch.empty(ROWS * SEQ_LEN, moonlight().hidden_size, dtype=torch.bfloat16, device=META)
    count.calls.clear()
    with count:
        chunk = Chunk(phases, Flow(entering.requires_grad_()))
        while chunk.next_forward is not None:
            chunk.forward()
        forward = count.calls.copy()
        flow: Flow = chunk.state
        flow.value.grad = torch.empty_like(entering)
        if flow.loss is not None:
            flow.loss.grad = torch.ones_like(flow.loss)
        while chunk.next_backward is not None:
            chunk.backward()
    backward = count.calls.copy()
    backward.subtract(forward)
    return [forward, +backward]


def stage(precision: PrecisionConfig, dense: bool, layers: int) -> Iterator[list[Phase]]:  # noqa: FBT001
    """The phases of some equal blocks, for one microbatch after another."""
    model = dataclasses.replace(
        moonlight(), num_hidden_layers=layers, first_k_dense_replace=layers if dense else 0
    )
    config = RunConfig(model=model, train=LoopConfig(steps=1), precision=precision)
    stages = build(
        model,
        schedules.build("gpipe", 1, 1, virtual_stages=1),
        Mesh.of(Layout(), 0),
        device=META,
        keep=lambda made: keep_weights(made, precision.weights),
        seed=None,
        fp8=precision.weights == "fp8",
    )
    sink = WeightGradients()
    for bucket in stages.all_buckets:
        bucket.collect(sink)
    recompute(stages.models[0], config)
    linear = linear_socket(precision, sink, stages.models.values())
    cu_seqlens = torch.empty(ROWS + 1, dtype=torch.int32, device=META)
    sockets = Sockets(PackedAttend(cu_seqlens, SEQ_LEN), LocalExchange(model.n_routed_experts), linear)
    objective = Objective(Weights(main=1.0, mtp=(), balance=1e-4), Tally(), ROWS, sink=sink)
    made = ModelStage(stages.models[0], first=False, buckets=stages.buckets, paired=False)
    unread: Any = None  # blocks read no tokens
    task = Task(unread, unread, sockets, objective)
    while True:
        steps = (
            step
            for each in made.model.blocks
            for step in made._block(each, task, angles(), f"layers.{each.layer}")  # noqa: SLF001
        )
        yield joined(steps, apart=made.paired)


def angles() -> Angles:
    """Of every token."""
    each: Tensor = torch.empty(ROWS * SEQ_LEN, moonlight().qk_rope_head_dim // 2, device=META)
    return Angles(each, each)


if __name__ == "__main__":
    main()
