"""Seconds of a step from prices of its operations, fast enough to be asked a hundred thousand times.

Prices are made at sizes on a grid (four to a doubling) and interpolated between; each grid point is priced
once. What a step's kernels cost is therefore piecewise linear in what it holds, and never falls when it holds
more; an engine's curves, where it has any, bend that to what was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from benthic.plan.cost.price import price
from benthic.plan.cost.priced import Total, total
from benthic.plan.serving.fronts import FREE, FrontCost
from benthic.plan.serving.operations import StepOperations
from benthic.sched.graph_sizes import FEW_DECODES, prompt_sizes, sizes_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.plan.cost.machine import Machine
    from benthic.plan.cost.ops import Op
    from benthic.plan.serving.layout import ServingLayout
    from benthic.plan.serving.steps import StepLoad
    from benthic.spec.model import ModelConfig

_PER_DOUBLING = 4
Curve = tuple[tuple[float, float], ...]


class Grid:
    """A function of one size, priced at grid points and linear between them; made to never fall."""

    __slots__ = ("_at", "_between", "_known")

    def __init__(self, seconds: Callable[[float], float]) -> None:
        self._at = seconds
        self._known: dict[int, float] = {}
        self._between: dict[int, tuple[float, float, float, float]] = {}

    def __call__(self, size: float) -> float:
        """Seconds; 0 for nothing."""
        if size <= 0.0:
            return 0.0
        if size <= 1.0:
            return self._point(0)
        below = int(math.log2(size) * _PER_DOUBLING)
        known = self._between.get(below)
        first, rise, low, width = self._line(below) if known is None else known
        return first + rise * (size - low) / width

    def _line(self, below: int) -> tuple[float, float, float, float]:
        """Seconds at a grid point, and to the next one their rise; its size, and the distance."""
        low, high = 2.0 ** (below / _PER_DOUBLING), 2.0 ** ((below + 1) / _PER_DOUBLING)
        first = self._point(below)
        self._between[below] = found = (first, self._point(below + 1) - first, low, high - low)
        return found

    def _point(self, index: int) -> float:
        known = self._known.get(index)
        if known is None:
            known = self._at(2.0 ** (index / _PER_DOUBLING))
            if index > 0:
                known = max(known, self._point(index - 1))
            self._known[index] = known
        return known


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine adds to its operations.

    Attributes:
        name: which engine.
        eager_layer_s: host seconds a layer of a step that is no CUDA graph: one with any piece of a prompt
            and more than `graph_rows` rows. The host launches ahead, so that such a step takes the longer of
            these and of the device's.
        graph_rows: most rows of a step with prompts that is a CUDA graph, padded to the next recorded size.
        graph_layer_s: device seconds a layer between the kernels of a graph of a step that only decodes;
            negative where kernels overlap, which at best halves a step.
        prompt_layer_s: the same in steps with prompts.
        stretch: seconds of its kernels over the prices of the operations, in steps that only decode.
        prompt_stretch: the same in steps with prompts, whose many rows take other kernels.
        curve, prompt_curve, mixed_curve: (rows, share) in rising order: how much longer than all this a step
            of so many rows is that only decodes, that has prompts alone, or that has both: other graphs.
            Between two of them by the logarithm of rows; outside as at the nearest.
        prompt_host_s: host seconds of a step with prompts that no step before it hides.
        front: what its processes that answer HTTP take for requests and tokens.
    """

    name: str = "tuned"
    eager_layer_s: float = 0.0
    graph_layer_s: float = 0.0
    stretch: float = 1.0
    prompt_stretch: float = 1.0
    prompt_layer_s: float = 0.0
    curve: Curve = ()
    prompt_curve: Curve = ()
    mixed_curve: Curve = ()
    graph_rows: int = 0
    prompt_host_s: float = 0.0
    front: FrontCost = FREE

    def recorded_rows(self, tokens: int, decodes: int = 0) -> int:
        """Rows of a step with prompts, `decodes` of its tokens among them, padded where it is a graph."""
        if tokens > self.graph_rows:
            return tokens
        sizes = prompt_sizes(self.graph_rows)
        if 0 < decodes <= FEW_DECODES:
            sizes = sizes_beside(sizes, FEW_DECODES)
        return sizes[bisect_left(sizes, tokens)]

    def share(self, rows: float, *, decodes: bool, prompts: bool) -> float:
        """What the curves say of a step with so many rows."""
        alone = self.prompt_curve if prompts else self.curve
        curve = self.mixed_curve if decodes and prompts else alone
        if not curve:
            return 1.0
        index = bisect_left(curve, (rows,))
        if index in (0, len(curve)):
            return curve[max(0, index - 1)][1]
        (low, first), (high, last) = curve[index - 1 : index + 1]
        return first + (last - first) * math.log(rows / low) / math.log(high / low)


TUNED = Engine()
"""Kernels as fast as those that were measured, launched without a gap."""


class Rank(NamedTuple):
    """One rank's part of a step: rows with padding, whether it decodes, whether it has prompts, its seconds.

    half_s: of half of it.
    """

    tokens: int
    decodes: bool
    prompts: bool
    whole_s: float
    half_s: float


def _slowest(ranks: Sequence[Rank]) -> Rank:
    """The most of everything that a rank does; a flag is set if it is for one of them."""
    return ranks[0] if len(ranks) == 1 else Rank(*map(max, zip(*ranks, strict=True)))


@dataclass(eq=False)
class PricedStep:
    """A `StepTime` for instances of one layout on one kind of machine.

    Ranks compute side by side, so the slowest one counts; experts get what all ranks bring.
    """

    model: ModelConfig
    layout: ServingLayout
    machine: Machine
    engine: Engine = TUNED
    operations: StepOperations = field(init=False)

    def __post_init__(self) -> None:
        self.operations = ops = StepOperations(
            model=self.model, layout=self.layout, gpus_per_node=self.machine.gpus_per_node
        )
        layers = self.model.num_hidden_layers
        dense = min(self.model.first_k_dense_replace, layers) if self.model.n_routed_experts else layers
        moe = layers - dense
        self._layers, self._moe = layers, moe
        self._padded = lru_cache(1 << 16)(self.engine.recorded_rows)
        self._share = lru_cache(1 << 16)(self.engine.share)
        self._blocks = Grid(
            lambda t: (
                layers * self._seconds(ops.projections(t))
                + dense * self._seconds(ops.dense(t))
                + (moe * self._seconds(ops.shared(t)) if moe else 0.0)
            )
        )
        self._expert_grid = Grid(lambda t: moe * self._seconds(ops.experts(t)) if moe else 0.0)
        self._exchange_grid = Grid(lambda t: moe * self._seconds(ops.exchange(t)) if moe else 0.0)
        # latents of earlier chunks are expanded again
        self._expand = Grid(lambda t: layers * self._seconds(ops.prefill(t, t, t)[:1]))
        self._head = Grid(lambda rows: self._seconds(ops.head(rows)))
        self._prefills: dict[int, Grid] = {}
        self._rows = lru_cache(1 << 16)(self._row_seconds)
        self._experts = lru_cache(1 << 16)(self._expert_seconds)
        self._decode = lru_cache(1 << 12)(self._decode_grid)
        self._decode_grids = lru_cache(1 << 12)(self._decode_at)

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds on the device, or of the host where that is slower."""
        return self.together([self.rank(load) for load in loads])

    def rank(self, load: StepLoad) -> Rank:
        """What one rank does before it meets the others."""
        halves = self._rank(load, 2) if self.layout.overlap else 0.0
        rows = self._padded(load.tokens, load.decodes) if load.prefill_tokens else load.tokens
        whole = self._rank(load, 1, rows - load.tokens)
        return Rank(rows, load.decodes > 0, load.prefill_tokens > 0, whole, halves)

    def together(self, ranks: Sequence[Rank]) -> float:
        """Seconds of a step of all ranks; their tokens spread over all experts."""
        engine, most = self.engine, _slowest(ranks)
        mean = sum([rank.tokens for rank in ranks]) / len(ranks)
        products, exchanges = self._experts(mean)
        device = products + exchanges + most.whole_s
        if self.layout.overlap:
            products, exchanges = self._experts(mean / 2.0)
            products += most.half_s
            device = min(device, 2.0 * max(products, exchanges))
        rows = most.tokens
        share = self._share(rows, decodes=most.decodes, prompts=most.prompts)
        if not most.prompts:
            kernels = engine.stretch * device
            return share * max(kernels + engine.graph_layer_s * self._layers, kernels / 2.0)
        device *= engine.prompt_stretch
        if rows > engine.graph_rows:
            return max(share * device, engine.eager_layer_s * self._layers)
        return share * (device + engine.prompt_layer_s * self._layers)

    def _rank(self, load: StepLoad, parts: int, padding: int = 0) -> float:
        seconds = self._rows(load.decode_tokens + load.prefill_tokens + padding, load.samples, parts)
        if load.decodes:
            queries = round(load.decode_tokens / load.decodes)
            seconds += self._decode(load.decodes, queries, parts)(load.decode_context / parts)
        if load.prefill_tokens:
            seconds += self._prefill(load, parts)
        return seconds

    def _row_seconds(self, tokens: int, samples: int, parts: int) -> float:
        return self._blocks(tokens / parts) + self._head(samples / parts)

    def _expert_seconds(self, tokens: float) -> tuple[float, float]:
        return self._expert_grid(tokens), self._exchange_grid(tokens)

    def _decode_grid(self, decodes: int, queries: int, parts: int) -> Grid:
        """Of the context of so many sequences, rounded up to a step of the grid of sequences."""
        index = math.ceil(math.log2(max(1.0, decodes / parts)) * _PER_DOUBLING)
        return self._decode_grids(index, queries)

    def _decode_at(self, index: int, queries: int) -> Grid:
        ops, sequences = self.operations, 2.0 ** (index / _PER_DOUBLING)
        rows = queries * sequences
        absorbed = self._seconds(ops.absorb(rows))
        return Grid(
            lambda context: (
                self._layers
                * (absorbed + self._seconds(ops.decode(sequences, rows, max(context, sequences))))
            )
        )

    def _prefill(self, load: StepLoad, parts: int) -> float:
        """By tokens and by how many keys each meets, on a coarse grid of the latter."""
        tokens = load.prefill_tokens / parts
        keys = load.prefill_pairs / load.prefill_tokens
        index = math.ceil(math.log2(max(1.0, keys)) * _PER_DOUBLING)
        share = keys / 2.0 ** (index / _PER_DOUBLING)
        grid = self._prefills.get(index)
        if grid is None:
            mean = 2.0 ** (index / _PER_DOUBLING)
            grid = self._prefills[index] = Grid(
                lambda t: self._layers * self._seconds(self.operations.prefill(t, t * mean, t))
            )
        return grid(tokens) * share + self._expand(load.prefill_context / parts) - self._expand(tokens)

    def _seconds(self, ops: Sequence[Op]) -> float:
        return sum([price(op, self.machine).seconds for op in ops])

    def breakdown(self, load: StepLoad) -> dict[str, Total]:
        """Where a step's seconds go when every rank has `load`, with bounds and provenance; no overlap."""
        ops, layers, moe = self.operations, self._layers, self._moe
        tokens = float(load.tokens)
        parts: dict[str, Total] = {
            "projections": self._sum(ops.projections(tokens)).times(layers),
            "dense layers": self._sum(ops.dense(tokens)).times(layers - moe),
        }
        if moe:
            parts["shared experts, router"] = self._sum(ops.shared(tokens)).times(moe)
            parts["routed experts"] = self._sum(ops.experts(tokens)).times(moe)
            parts["exchange"] = self._sum(ops.exchange(tokens)).times(moe)
        if load.decodes:
            attend = ops.decode(load.decodes, load.decode_tokens, load.decode_context)
            parts["attention, decode"] = self._sum([*ops.absorb(load.decode_tokens), *attend]).times(layers)
        if load.prefill_tokens:
            attend = ops.prefill(load.prefill_tokens, load.prefill_pairs, load.prefill_context)
            parts["attention, prefill"] = self._sum(attend).times(layers)
        parts["head and sampling"] = self._sum(ops.head(max(1, load.samples)))
        return {name: part for name, part in parts.items() if part.seconds > 0.0}

    def _sum(self, ops: Sequence[Op]) -> Total:
        return total([price(op, self.machine) for op in ops])


class Echo:
    """A `StepTime` of an instance of which only some ranks are simulated.

    The others are taken to do what the simulated ones did in the steps before: equal ranks that serve equal
    requests at other moments. So a step waits for a prompt as often as one of all ranks has one.

    Args:
        step: of the whole instance.
        copies: simulated ranks times this are all ranks.
    """

    def __init__(self, step: PricedStep, copies: int) -> None:
        self._step = step
        self._seen: deque[Sequence[Rank]] = deque(maxlen=copies)

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds."""
        self._seen.append([self._step.rank(load) for load in loads])
        return self._step.together([rank for ranks in self._seen for rank in ranks])
