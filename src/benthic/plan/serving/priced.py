"""Seconds of a step from prices of its operations, fast enough to be asked a hundred thousand times.

Prices are made at sizes on a grid (eight to a doubling) and interpolated between; each grid point is priced
once. What a step costs is therefore piecewise linear in what it holds, and never falls when it holds more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benthic.plan.cost.price import price
from benthic.plan.cost.priced import Total, total
from benthic.plan.serving.operations import StepOperations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.plan.cost.machine import Machine
    from benthic.plan.cost.ops import Op
    from benthic.plan.serving.layout import ServingLayout
    from benthic.plan.serving.steps import StepLoad
    from benthic.spec.model import ModelConfig

_PER_DOUBLING = 8


class Grid:
    """A function of one size, priced at grid points and linear between them; made to never fall."""

    __slots__ = ("_at", "_known")

    def __init__(self, seconds: Callable[[float], float]) -> None:
        self._at = seconds
        self._known: dict[int, float] = {}

    def __call__(self, size: float) -> float:
        """Seconds; 0 for nothing."""
        if size <= 0.0:
            return 0.0
        if size <= 1.0:
            return self._point(0)
        place = math.log2(size) * _PER_DOUBLING
        below = int(place)
        low, high = 2.0 ** (below / _PER_DOUBLING), 2.0 ** ((below + 1) / _PER_DOUBLING)
        first = self._point(below)
        return first + (self._point(below + 1) - first) * (size - low) / (high - low)

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
        eager_layer_s: host seconds a layer of a step that is no CUDA graph (one with prompts in it); they run
            beside the device.
        graph_layer_s: device seconds a layer between the kernels of a graph.
        stretch: seconds of its kernels over the prices of the operations.
    """

    name: str = "tuned"
    eager_layer_s: float = 0.0
    graph_layer_s: float = 0.0
    stretch: float = 1.0


TUNED = Engine()
"""Kernels as fast as those that were measured, launched without a gap."""


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
        self._dense_rows = Grid(
            lambda t: layers * self._seconds(ops.projections(t))
            + dense * self._seconds(ops.dense(t))
            + (moe * self._seconds(ops.shared(t)) if moe else 0.0)
        )
        self._experts = Grid(lambda t: moe * self._seconds(ops.experts(t)) if moe else 0.0)
        self._exchange = Grid(lambda t: moe * self._seconds(ops.exchange(t)) if moe else 0.0)
        self._absorb = Grid(lambda t: layers * self._seconds(ops.absorb(t)))
        # latents of earlier chunks are expanded again
        self._expand = Grid(lambda t: layers * self._seconds(ops.prefill(t, t, t)[:1]))
        self._head = Grid(lambda rows: self._seconds(ops.head(rows)))
        self._decodes: dict[tuple[int, int], Grid] = {}
        self._prefills: dict[int, Grid] = {}

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds on the device, or of the host where that is slower."""
        engine = self.engine
        halves = [1, 2] if self.layout.overlap else [1]
        device = engine.stretch * min([self._device(loads, parts) for parts in halves])
        device += engine.graph_layer_s * self._layers
        if any([load.prefill_tokens for load in loads]):
            return max(device, engine.eager_layer_s * self._layers)
        return device

    def _device(self, loads: Sequence[StepLoad], parts: int) -> float:
        """Seconds in so many equal parts; with two, exchanges run beside products."""
        mean = sum([load.tokens for load in loads]) / (len(loads) * parts)
        products = parts * (max([self._rank(load, parts) for load in loads]) + self._experts(mean))
        exchanges = parts * self._exchange(mean)
        return products + exchanges if parts == 1 else max(products, exchanges)

    def _rank(self, load: StepLoad, parts: int) -> float:
        seconds = self._dense_rows(load.tokens / parts) + self._head(load.samples / parts)
        if load.decodes:
            seconds += self._absorb(load.decode_tokens / parts)
            seconds += self._decode(load, parts)
        if load.prefill_tokens:
            seconds += self._prefill(load, parts)
        return seconds

    def _decode(self, load: StepLoad, parts: int) -> float:
        """Sequences are rounded up to a step of the grid, their context is interpolated."""
        index = math.ceil(math.log2(max(1.0, load.decodes / parts)) * _PER_DOUBLING)
        queries = round(load.decode_tokens / load.decodes)
        grid = self._decodes.get((index, queries))
        if grid is None:
            sequences = 2.0 ** (index / _PER_DOUBLING)
            grid = self._decodes[index, queries] = Grid(
                lambda context: self._layers
                * self._seconds(self.operations.decode(sequences, queries * sequences, max(context, sequences)))
            )
        return grid(load.decode_context / parts)

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
        seen = load.prefill_context / load.prefill_tokens
        return grid(tokens) * share + (seen - 1.0) * self._expand(tokens)

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
