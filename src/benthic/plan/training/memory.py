"""What each rank of a candidate keeps, term by term, at its peak and over the time of a step.

Weights, masters, gradients, moments and activations are the trainer's own count (`parallel.footprint`).
Beside them lie what a backward works with and what an update works with, of which the larger one counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from benthic.parallel.activations import block_bytes, peak_bytes, stage_bytes
from benthic.parallel.footprint import kept_bytes, replicas_of
from benthic.parallel.parts import held_by, kind_of, parts_of, stages_of
from benthic.plan.training.block import LOGITS
from benthic.plan.training.candidate import Rows
from benthic.sched.pipeline.table import Table
from benthic.spec.layout import Layout
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from benthic.model.part import Part
    from benthic.plan.training.candidate import Candidate
    from benthic.plan.training.step import Step
    from benthic.spec.hardware import Hardware
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param

Routes = tuple[tuple[int, ...], ...]

TERMS: Final = ("weights", "masters", "gradients", "moments", "activations", "working", "reserve")
WEIGHT_GRADIENT: Final = 8  # bytes an element of a weight gradient that is added to its sum after its product
UPDATE: Final = 16  # bytes an element of the arrays of an AdamW that is not one kernel

_RESERVE: Final = 0.05  # of activations and working memory: rounding and holes of the allocator
_GIB_OF_A_GB: Final = 2**30 / 1e9  # vendors' "80 GB" of HBM are GiB
_DRIVER: Final = 0.0044  # an 80 GB card shows 81,559 of 81,920 MiB
_CONTEXT: Final = 0.95e9  # bytes of a CUDA context (0.55) and of NCCL's buffers (0.4)


@dataclass(frozen=True)
class Memory:
    """One pipeline rank's bytes by term, in the order of `TERMS`."""

    rank: int
    terms: dict[str, float]

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self.terms.values())


def usable(hardware: Hardware) -> float:
    """Bytes of a GPU's memory that tensors may take."""
    return hardware.hbm_bytes * _GIB_OF_A_GB * (1 - _DRIVER) - _CONTEXT


def memory(candidate: Candidate, table: Table) -> tuple[Memory, ...]:
    """The peak of the first rank of every pipeline rank."""
    return tuple(
        Memory(pp, kept(candidate, table.routes, pp, peak_bytes(candidate, table, pp)))
        for pp in range(table.ranks)
    )


def kept(candidate: Candidate, routes: Routes, pp: int, activations: float) -> dict[str, float]:
    """The terms of one pipeline rank whose activations are known."""
    parts = parts_of(candidate.model, candidate.layout, len(routes[0]))
    here = tuple(parts[stage] for stage in range(len(parts)) if any(route[stage] == pp for route in routes))
    bare = replace(candidate.layout, schedule="1f1b", virtual_stages=None)
    still = replace(candidate, layout=bare, train=Rows(), rows=1, recompute=(), offload=())
    terms = dict(_static(still, routes, pp))
    backward, update = _backward(candidate, here), _update(candidate, here)
    terms["activations"] = float(activations)
    terms["working"] = max(backward, update - activations)
    terms["reserve"] = _RESERVE * (activations + backward)
    return terms


@functools.lru_cache(maxsize=1 << 14)
def _static(candidate: Candidate, routes: Routes, pp: int) -> tuple[tuple[str, float], ...]:
    """What no microbatch and no order of slots changes."""
    ranks = 1 + max(map(max, routes))
    empty = Table(name="", slots=((),) * ranks, routes=routes, route_of=())
    return tuple((name, float(size)) for name, size in kept_bytes(candidate, empty, pp).items())


def stage_size(candidate: Candidate, part: Part) -> float:
    """What one microbatch keeps in a stage."""
    return _stage_size(_core(candidate), part)


@functools.lru_cache(maxsize=1 << 14)
def _stage_size(core: Candidate, part: Part) -> float:
    return float(stage_bytes(core, part))


def _core(candidate: Candidate) -> Candidate:
    """The candidate without what a block's activations do not depend on."""
    layout = candidate.layout
    inner = Layout(tp_degree=layout.tp_degree, cp_degree=layout.cp_degree, ep_degree=layout.ep_degree)
    return replace(candidate, layout=inner, rows=1)


def worst(candidate: Candidate, table: Table) -> Memory:
    """The rank that needs most."""
    return max(memory(candidate, table), key=lambda one: one.total)


def timeline(found: Step, rank: int) -> list[tuple[float, float]]:
    """Times in seconds at which the activations of a rank change, and the bytes from then on."""
    candidate, table = found.candidate, found.timeline.table
    parts = parts_of(candidate.model, candidate.layout, table.stages)
    size = {stage: stage_bytes(candidate, parts[stage]) for stage in stages_of(table, rank)}
    events = [(0.0, 0.0)]
    for timed in found.timeline.slots[rank]:
        for action in timed.slot.actions:
            if action.kind == "F":
                events.append((timed.start, float(size[action.stage])))
            elif action.kind != "I":
                events.append((timed.end, -float(size[action.stage])))
    held, curve = 0.0, []
    for at, change in sorted(events, key=lambda event: event[0]):
        held += change
        curve.append((at, held))
    return curve


def _backward(candidate: Candidate, here: tuple[Part, ...]) -> float:
    """The larger of a block's backward and the head's, with what ZeRO-3 gathers meanwhile."""
    layers = [layer for part in here for layer in part.layers]
    blocks = max((_block(candidate, layer) for layer in (layers[0], layers[-1])), default=0.0)
    head = 0.0
    if any(part.head for part in here):
        head = float(LOGITS)
    gathered = 0.0
    if candidate.layout.zero_stage >= 2:
        gathered = max(_unit(candidate, layer) for layer in (layers[0], layers[-1]))
    return max(blocks, head) + gathered


def _block(candidate: Candidate, layer: int) -> float:
    """The gradients of rows into and out of experts, recomputation, and in FP8 the largest weight gradient.

    BF16 products add weights' gradients to their sums themselves. What is recomputed counts three times:
    itself, its gradients, and what it passes through on the way.
    """
    model = candidate.model
    tokens = candidate.train.local_batch_size * candidate.train.seq_len // candidate.layout.token_shards
    copies = model.num_experts_per_tok if model.is_moe(layer) else 1
    rows = 2 * 2.0 * copies * model.hidden_size
    apart = WEIGHT_GRADIENT * _largest(candidate, layer) if candidate.precision.matmul == "fp8" else 0.0
    return apart + tokens * (rows + 3 * _keeping(_core(candidate), layer))


@functools.lru_cache(maxsize=1 << 12)
def _keeping(candidate: Candidate, layer: int) -> float:
    """Bytes a token that are kept more if nothing is recomputed."""
    everything = replace(candidate, recompute=(), offload=())
    return max(0.0, block_bytes(everything, layer) - block_bytes(candidate, layer))


def _numel(param: Param, layout: Layout) -> float:
    return param.numel / {"expert": layout.ep_degree, "sharded": layout.tp_degree}.get(kind_of(param), 1)


@functools.lru_cache(maxsize=1 << 10)
def _params_of(model: ModelConfig, layer: int) -> tuple[Param, ...]:
    return tuple(param for param in parameters(model) if param.name.startswith(f"layers.{layer}."))


def _of_layer(candidate: Candidate, layer: int) -> list[tuple[str, float]]:
    """Kind and elements of a layer's parameters on one rank."""
    params = _params_of(candidate.model, layer)
    return [(kind_of(param), _numel(param, candidate.layout)) for param in params]


def _largest(candidate: Candidate, layer: int) -> float:
    return max(count for _, count in _of_layer(candidate, layer))


def _unit(candidate: Candidate, layer: int) -> float:
    """A layer's whole gradients and the shard they are reduced to; under ZeRO-3 also its weights."""
    whole = sum(count for _, count in _of_layer(candidate, layer))
    shard = sum(count / replicas_of(candidate.layout, kind) for kind, count in _of_layer(candidate, layer))
    weights = 2.0 * whole if candidate.layout.zero_stage == 3 else 0.0
    return 4.0 * (whole + shard) + weights


def _update(candidate: Candidate, here: tuple[Part, ...]) -> float:
    """Arrays that an update of the largest piece allocates, if it is not one kernel."""
    if candidate.optimizer.fused:
        return 0.0
    layout = candidate.layout
    held = held_by(candidate.model, here)
    return UPDATE * max(_numel(p, layout) / replicas_of(layout, kind_of(p)) for p in held)
