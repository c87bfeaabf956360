"""The end of a step: gradients summed, masters updated, weights gathered. As `parallel.buckets` does it.

Under ZeRO-1 a rank's gradients are reduced and its weights gathered once a step; under ZeRO-2 gradients are
reduced after every microbatch; under ZeRO-3 weights are also gathered before every forward and backward.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.parallel.footprint import replicas_of
from benthic.parallel.parts import held_by, kind_of, parts_of
from benthic.plan.cost.ops import Collective, MemoryBound
from benthic.plan.cost.price import price
from benthic.plan.cost.priced import Total, total
from benthic.plan.training.stage import Sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.model.part import Part
    from benthic.plan.cost.machine import Machine
    from benthic.plan.cost.ops import Op
    from benthic.plan.training.candidate import Candidate
    from benthic.spec.model import ModelConfig

Routes = tuple[tuple[int, ...], ...]

_GRADIENT: Final = 4.0
_PASSES: Final = 112.0  # bytes an element that AdamW's expressions read and write one by one
_MOMENT: Final = {"float32": 4.0, "bfloat16": 2.0}


class Held(NamedTuple):
    """Elements of one kind of parameter on a rank: all, and those whose products are in FP8."""

    elements: float
    narrow: float


@dataclass(frozen=True)
class Update:
    """Seconds at the end of a step on the rank that holds most, and of each microbatch during it."""

    collectives: Total
    optimizer: Total
    each_forward: Total
    each_backward: Total

    @property
    def each_microbatch(self) -> Total:
        """What ZeRO-2 and 3 do around every microbatch."""
        return self.each_forward + self.each_backward

    @property
    def end(self) -> Total:
        """What follows the last backward."""
        return self.collectives + self.optimizer


def update(candidate: Candidate, machine: Machine, routes: Routes) -> Update:
    """What summing, updating and gathering takes."""
    model, layout = candidate.model, candidate.layout
    parts = parts_of(model, layout, len(routes[0]))
    held = _most_held(model, parts, routes, layout.ep_degree, layout.tp_degree)
    gathers = [price(op, machine) for op in _gathers(candidate, machine, held)]
    sums = [price(op, machine) for op in _sums(candidate, machine, held)]
    return Update(
        collectives=total(price(op, machine) for op in _once(candidate, machine, held, routes)),
        optimizer=total(price(op, machine) for op in _arithmetic(candidate, held)),
        each_forward=total(gathers),
        each_backward=total([*gathers, *sums]),
    )


@functools.lru_cache(maxsize=1 << 12)
def _most_held(
    model: ModelConfig, parts: tuple[Part, ...], routes: Routes, ep: int, tp: int
) -> dict[str, Held]:
    """Elements by kind on the pipeline rank that holds most."""
    held_on = [
        tuple(part for stage, part in enumerate(parts) if any(route[stage] == pp for route in routes))
        for pp in sorted({pp for route in routes for pp in route})
    ]
    return max((_held(model, here, ep, tp) for here in held_on), key=_size)


def _size(held: dict[str, Held]) -> float:
    return sum(one.elements for one in held.values())


@functools.lru_cache(maxsize=1 << 12)
def _held(model: ModelConfig, here: tuple[Part, ...], ep: int, tp: int) -> dict[str, Held]:
    """Elements by kind on a pipeline rank with these stages, each parameter once."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for param in held_by(model, here):
        if param.trainable:
            kind = kind_of(param)
            count = param.numel / {"expert": ep, "sharded": tp}.get(kind, 1)
            found[kind][0] += count
            found[kind][1] += count if param.fp8 else 0.0
    return {kind: Held(*counts) for kind, counts in found.items()}


def _group(candidate: Candidate, machine: Machine, kind: str) -> tuple[int, int]:
    """Ranks that hold the same part, and how many of them share a node."""
    layout = candidate.layout
    ranks = replicas_of(layout, kind)
    apart = {"expert": layout.ep_degree, "sharded": layout.tp_degree}.get(kind, 1)
    return ranks, max(1, min(ranks, machine.gpus_per_node // apart))


def _once(candidate: Candidate, machine: Machine, held: dict[str, Held], routes: Routes) -> Iterator[Op]:
    """Collectives once a step."""
    stage, twice = candidate.layout.zero_stage, len(routes) > 1
    for kind, one in held.items():
        ranks, per_node = _group(candidate, machine, kind)
        if ranks > 1 and stage == 1:
            yield _collective("reduce-scatter", _GRADIENT * one.elements, ranks, per_node)
        if ranks > 1 and stage < 3:
            yield _collective("all-gather", _running(candidate, one), ranks, per_node)
        if twice:  # the partner's copies of the same stages, shard by shard
            near = 2 if candidate.layout.ranks <= machine.gpus_per_node else 1
            yield _collective("all-reduce", _GRADIENT * one.elements / ranks, 2, near)


def _gathers(candidate: Candidate, machine: Machine, held: dict[str, Held]) -> Iterator[Op]:
    """Weights under ZeRO-3, before every forward and every backward."""
    for kind, one in held.items():
        ranks, per_node = _group(candidate, machine, kind)
        if candidate.layout.zero_stage == 3 and ranks > 1:
            yield _collective("all-gather", _running(candidate, one), ranks, per_node)


def _sums(candidate: Candidate, machine: Machine, held: dict[str, Held]) -> Iterator[Op]:
    """Gradients from ZeRO-2 on, after every backward."""
    if candidate.layout.zero_stage == 1:
        return
    for kind, one in held.items():
        ranks, per_node = _group(candidate, machine, kind)
        if ranks > 1:
            yield _collective("reduce-scatter", _GRADIENT * one.elements, ranks, per_node)
        yield MemoryBound(bytes=_GRADIENT * one.elements * (1 + 3 / ranks))  # cleared; added to the shard


def _arithmetic(candidate: Candidate, held: dict[str, Held]) -> Iterator[Op]:
    """The norm of gradients and the update of a shard: masters, moments and weights.

    Only gradients of FP32 weights are cleared: the first of others is written over those of the step before.
    """
    wide = candidate.precision.weights == "float32"
    rounded = 0.0 if wide or candidate.optimizer.store_param_remainders else 2.0
    moments = 2 * _MOMENT[candidate.optimizer.moment_dtype]
    for kind, one in held.items():
        shard = one.elements / replicas_of(candidate.layout, kind)
        cleared = (one.elements if wide else 0.0) if candidate.layout.zero_stage == 1 else shard
        yield MemoryBound(bytes=_GRADIENT * (cleared + shard), name="clear and norm")
        passes = 8.0 + _GRADIENT + 2 * moments if candidate.optimizer.fused else _PASSES
        yield MemoryBound(bytes=shard * (passes + rounded), name="adamw")
        if candidate.precision.weights == "fp8":
            yield MemoryBound(bytes=5.0 * one.narrow, name="quantise 128x128")
            yield MemoryBound(bytes=2.0 * one.narrow, name="transpose fp8")


def _running(candidate: Candidate, held: Held) -> float:
    """Bytes of the weights that are gathered: FP32 masters of what is FP8, else BF16 or FP32."""
    if candidate.precision.weights == "float32":
        return 4.0 * held.elements
    if candidate.precision.weights == "fp8":
        return 4.0 * held.narrow + 2.0 * (held.elements - held.narrow)
    return 2.0 * held.elements


def _collective(name: str, moved: float, ranks: int, per_node: int) -> Collective:
    names = {"reduce-scatter": "reduce-scatter", "all-gather": "all-gather", "all-reduce": "all-reduce"}
    return Collective(name=names[name], bytes=moved, ranks=ranks, per_node=per_node)  # type: ignore[arg-type]


def sync_of(found: Update, candidate: Candidate, forwards: int) -> Sync:
    """What each of so many forwards of a rank, and each backward, has of what ZeRO does for a microbatch."""
    share = candidate.microbatches / forwards
    return Sync(share * found.each_forward.seconds, share * found.each_backward.seconds)
