"""Measures this machine's operations for the planner: what `benthic calibrate` writes."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Final

import torch

from benthic.cli import calibration_kernels
from benthic.errors import BackendError
from benthic.kernels import ops
from benthic.kernels.bench.calls import ends_of
from benthic.plan.cost.machine import Measured, Profile
from benthic.plan.cost.ops import Gemm, GroupedGemm, MemoryBound
from benthic.plan.cost.points import Points
from benthic.plan.cost.roofline import ideal
from benthic.spec import hardware as gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benthic.cli.calibration_kernels import Kernels
    from benthic.plan.cost.ops import Dtype, Op
    from benthic.spec.hardware import Hardware

    Calls = Iterator[tuple[Op, Callable[[], object]]]

_REPEATS: Final = 7
_HOST: Final = "a host"
_COLD_BYTES: Final = 128 * 2**20
"""Weights are used in turn from copies of this size together, so that no GPU's cache holds them all."""
_SIDE, _REST_S, _HOT_S = 8192, 1.0, 5.0
_ROUTED_ROWS: Final = 64
"""Rows an expert from which routing draws them, and tiles are left half empty; with fewer every expert has as
many, for those that nobody chose are counted apart."""
_SHORT_S: Final = 5e-4
"""Below, calls are timed inside a CUDA graph, where the host does not count; a step of serving is one."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows of products, (n, k) of their weights, bytes.

    Experts' products have `expert_rows` rows for each of `experts` experts.
    """

    rows: tuple[int, ...]
    expert_rows: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]
    bytes: tuple[int, ...]
    experts: tuple[int, ...]


ON_GPU: Final = Sizes(
    rows=(1, 8, 32, 64, 96, 128, 256, 512, 1024, 2048, 3072, 4096, 8192, 16384),
    expert_rows=(1, 3, 6, 12, 24, 48, 128, 256, 512),
    weights=((2112, 7168), (24576, 1536), (4096, 7168), (7168, 2048), (2816, 2048), (3072, 2048)),
    bytes=tuple(round(2 ** (half / 2)) for half in range(44, 63)),
    experts=(8, 32, 64),
)
ON_CPU: Final = Sizes(
    rows=(16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    expert_rows=(32, 48, 64),
    weights=((256, 256), (512, 256), (1024, 512)),
    bytes=tuple(2**power for power in range(18, 26)),
    experts=(4,),
)


@dataclass(frozen=True)
class Stopwatch:
    """Median seconds of a call on a device, after one that warms up."""

    device: str
    clock: Callable[[], float] = perf_counter

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call; several are timed together where one is short."""
        call()
        once = self.time(call, 1)
        count = max(1, min(50, int(2e-3 / max(once, 1e-7))))
        return statistics.median(self.time(call, count) / count for _ in range(_REPEATS))

    def time(self, call: Callable[[], object], count: int) -> float:
        """Of so many calls, all of them."""
        self.wait()
        start = self.clock()
        for _ in range(count):
            call()
        self.wait()
        return max(self.clock() - start, 1e-9)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class GraphStopwatch(Stopwatch):
    """Median seconds on a GPU: of short calls inside a CUDA graph, of long ones as the host launches them."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        launched = super().seconds(call)
        if launched > _SHORT_S:  # or something else went on: a kernel was compiled, clocks were low
            launched = min(launched, super().seconds(call))
        if launched > _SHORT_S:
            return launched
        count = max(16, int(2e-3 / launched))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread looks after NCCL
            for _ in range(count):
                call()
        graph.replay()
        return statistics.median(self.time(graph.replay, 1) / count for _ in range(_REPEATS))


@dataclass(frozen=True)
class Share:
    """What one of several equal devices measures, and for how long.

    rank, ranks: every rank takes other pairs of each kind's points. seconds: the first of every pair is
    measured, the second ones (which lie between) while it is earlier than this.
    """

    rank: int = 0
    ranks: int = 1
    seconds: float = math.inf

    def has(self, number: int) -> bool:
        """Whether this rank measures the so-manieth point of a kind."""
        return number // 2 % self.ranks == self.rank


def calibrate(
    device: str,
    *,
    sizes: Sizes | None = None,
    kernels: Kernels | None = calibration_kernels.ON_GPU,
    clock: Callable[[], float] = perf_counter,
    share: Share = Share(),
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Profile:
    """Time products, grouped products, streams and, on a GPU, our own `kernels`.

    Tells the kind of each point before it is measured, how many have been, and how many are known of.

    Raises:
        BackendError: "cuda" was asked for and there is none.
    """
    refuse_without_gpu(device)
    chosen = sizes or (ON_GPU if device == "cuda" else ON_CPU)
    launched = Stopwatch(device, clock)
    watch = GraphStopwatch(device, clock) if device == "cuda" else launched
    source = f"benthic calibrate, torch {torch.__version__}, {_threads(device)}"
    groups: list[tuple[Stopwatch, Callable[[], Calls]]] = [(watch, partial(_calls, device, chosen))]
    if device == "cuda" and kernels is not None:
        own = (calibration_kernels.gradients, calibration_kernels.tiles, calibration_kernels.decoding)
        groups += [(watch, partial(calls, device, kernels)) for calls in own]
        # a backward pass runs on the stream of its forward pass, which is not one that captures
        groups.append((launched, partial(calibration_kernels.attention, device, kernels)))
    points = [Measured(op, seconds, source) for op, seconds in _measured(groups, share, clock, tell)]
    if device == "cuda" and share.rank == 0:
        points += [Measured(op, seconds, source) for op, seconds in _sustained(launched)]
    return Profile(hardware=_name(device), source=source, points=tuple(points))


def _measured(
    groups: Sequence[tuple[Stopwatch, Callable[[], Calls]]],
    share: Share,
    clock: Callable[[], float],
    tell: Callable[[str, int, int], None],
) -> list[tuple[Op, float]]:
    """This rank's share of all points, in their order."""
    until, mine = clock() + share.seconds, 0
    found: dict[tuple[int, int], tuple[Op, float]] = {}
    for half, (group, (watch, calls)) in itertools.product(range(2), enumerate(groups)):
        seen: Counter[str] = Counter()
        for number, (op, call) in enumerate(calls()):
            if half and clock() >= until:
                break
            at = seen[op.kind]
            seen[op.kind] += 1
            if not share.has(at):
                continue
            mine += half == 0
            if at % 2 == half:
                tell(op.kind, len(found), mine)
                found[group, number] = op, watch.seconds(call)
    tell("", len(found), mine)
    return [found[place] for place in sorted(found)]


def refuse_without_gpu(device: str) -> None:
    """Raises: BackendError: "cuda" was asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        message = "device=cuda, but torch sees 0 CUDA GPUs. Calibrate with --device cpu."
        raise BackendError(message)


def errors(profile: Profile) -> dict[str, float]:
    """Median relative error of each kind's points when each is foretold from the others; leave one out."""
    hardware = machine_of(profile)
    found: dict[str, float] = {}
    for kind, points in profile.kinds.items():
        shares = [(one.op.at, ideal(one.op, hardware) / one.seconds) for one in points]
        table, off = Points(shares), []
        for at, share in shares:
            foretold = table.find(at, without=at)
            if foretold is not None:
                off.append(abs(share / foretold.utilisation - 1.0))
        if off:
            found[kind] = statistics.median(off)
    return found


def machine_of(profile: Profile) -> Hardware:
    """The hardware of a profile: a known GPU's, else the best rates that were measured."""
    if profile.hardware in gpus.names():
        return gpus.get(profile.hardware)
    flops = max(
        (one.op.flops / one.seconds for one in profile.points if isinstance(one.op, Gemm)), default=1.0
    )
    moved = [one.op.bytes / one.seconds for one in profile.points if isinstance(one.op, MemoryBound)]
    rate = max(moved, default=1.0)
    return gpus.Hardware(
        name=profile.hardware,
        bf16_flops=2 * flops,  # FP32 products take half of it
        fp8_flops=None,
        hbm_bytes=1.0,
        hbm_bandwidth=rate,
        nvlink_bandwidth=rate,
        network_bandwidth=rate,
        pcie_bandwidth=rate,
        sms=1,
        smem_bytes=1,
        l2_bytes=1,
        watts=1.0,
        source=profile.source,
    )


def _name(device: str) -> str:
    if device != "cuda":
        return _HOST
    found = torch.cuda.get_device_properties(0).name.lower()
    return next((name for name in sorted(gpus.names(), reverse=True) if name in found), found)


def _threads(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _calls(device: str, sizes: Sizes) -> Calls:
    """What is timed, each with its operands ready."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield from _products(device, sizes, dtype, "bf16" if device == "cuda" else "fp32")
    if device == "cuda":
        yield from _fp8_products(device, sizes)
    yield from _streams(device, sizes, dtype)
    yield from _sums(device, sizes, dtype)


def _in_turn(
    function: Callable[..., object], rows: object, weights: Sequence[object], *rest: object, **options: object
) -> Callable[[], object]:
    """Calls `function` with the next of `weights` every time."""
    turn = itertools.cycle(weights)
    return lambda: function(rows, next(turn), *rest, **options)


def _sustained(watch: Stopwatch) -> Iterator[tuple[Op, float]]:
    """A large product on a GPU that has rested, and after seconds of it, when power limits its clock."""
    side = torch.randn(_SIDE, _SIDE, device=watch.device, dtype=torch.bfloat16)
    sleep(_REST_S)
    yield Gemm(m=_SIDE, n=_SIDE, k=_SIDE), watch.seconds(partial(torch.matmul, side, side))
    began = watch.clock()
    while watch.clock() - began < _HOT_S:
        took = watch.seconds(partial(torch.matmul, side, side))
    yield Gemm(m=_SIDE, n=_SIDE, k=_SIDE, name="sustained"), took


def _copies(device: str, num_bytes: float) -> int:
    return -(-_COLD_BYTES // int(num_bytes)) if device == "cuda" else 1


def _products(device: str, sizes: Sizes, dtype: torch.dtype, word: Dtype) -> Calls:
    for n, k in sizes.weights:
        copies = _copies(device, n * k * dtype.itemsize)
        weights = [torch.randn(n, k, device=device, dtype=dtype).t() for _ in range(copies)]
        for m in sizes.rows:
            x = torch.randn(m, k, device=device, dtype=dtype)
            yield Gemm(m=m, n=n, k=k, dtype=word), _in_turn(torch.matmul, x, weights)
    n, k = sizes.weights[-1]
    for experts in sizes.experts:
        copies = _copies(device, experts * n * k * dtype.itemsize)
        stacks = [torch.randn(experts, n, k, device=device, dtype=dtype) for _ in range(copies)]
        for each in sizes.expert_rows:
            rows = torch.randn(experts * each, k, device=device, dtype=dtype)
            ends = ends_of(experts, each, device, drawn=each >= _ROUTED_ROWS)
            op = GroupedGemm(rows=experts * each, experts=experts, n=n, k=k, dtype=word)
            yield op, _in_turn(ops.grouped_linear, rows, stacks, ends)


def _fp8_products(device: str, sizes: Sizes) -> Calls:
    """Our own kernels on operands that are narrow already; quantising is measured apart."""
    wide = torch.bfloat16
    for n, k in sizes.weights:
        weights = [
            ops.Fp8(*ops.quantise_fp8_weight(torch.randn(n, k, device=device, dtype=wide)))
            for _ in range(_copies(device, n * k))
        ]
        for m in sizes.rows:
            x = torch.randn(m, k, device=device, dtype=wide)
            rows = ops.Fp8(*ops.quantise_fp8_rows(x))
            yield Gemm(m=m, n=n, k=k, dtype="fp8"), _in_turn(ops.fp8_linear, rows, weights, dtype=wide)
    n, k = sizes.weights[-1]
    for experts in sizes.experts:
        stacks = [
            ops.Fp8(*ops.quantise_fp8_weight(torch.randn(experts, n, k, device=device, dtype=wide)))
            for _ in range(_copies(device, experts * n * k))
        ]
        for each in sizes.expert_rows:
            x = torch.randn(experts * each, k, device=device, dtype=wide)
            ends = ends_of(experts, each, device, drawn=each >= _ROUTED_ROWS)
            op = GroupedGemm(rows=experts * each, experts=experts, n=n, k=k, dtype="fp8")
            rows = ops.Fp8(*ops.quantise_fp8_rows(x))
            yield op, _in_turn(ops.fp8_linear, rows, stacks, ends, dtype=wide)


def _sums(device: str, sizes: Sizes, dtype: torch.dtype) -> Calls:
    """Gradients added to float32 sums, as a backward pass does it."""
    for size in sizes.bytes:
        gradient = torch.randn(max(1, size // 10), device=device, dtype=dtype)
        total = torch.zeros(gradient.numel(), device=device)
        moved = gradient.nbytes + 2 * total.nbytes
        yield MemoryBound(bytes=moved, name="accumulate"), partial(total.add_, gradient)


def _streams(device: str, sizes: Sizes, dtype: torch.dtype) -> Calls:
    width = 1024
    weight = torch.ones(width, device=device, dtype=dtype)
    for size in sizes.bytes:
        x = torch.randn(max(1, size // (2 * width * dtype.itemsize)), width, device=device, dtype=dtype)
        y = torch.empty_like(x)
        yield MemoryBound(bytes=2 * x.nbytes), partial(y.copy_, x)
        yield MemoryBound(bytes=2 * x.nbytes, name="rms_norm"), partial(ops.rms_norm, x, weight, 1e-6)
        yield MemoryBound(bytes=1.5 * x.nbytes, name="swiglu"), partial(ops.swiglu, x)
