"""What each rank of a candidate keeps, term by term, at its peak and over the time of a step.

Weights, masters, gradients, moments and activations are the trainer's own count (`parallel.footprint`).
Working memory is what the fullest instant of a step needs beside them (`working`), or the end of the step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from benthic.parallel.activations import peak_bytes, stage_bytes
from benthic.parallel.footprint import kept_bytes, replicas_of
from benthic.parallel.parts import held_by, kind_of, parts_of, stages_of, unit_of
from benthic.parallel.setup import MUON_PARTS, SPARE_ROWS
from benthic.plan.training.candidate import Rows
from benthic.plan.training.phases import GPUS_OF_A_HOST, numel, tokens_of
from benthic.plan.training.space import OVERLAPPED
from benthic.plan.training.working import moments, peak
from benthic.sched.pipeline.table import Table
from benthic.spec.layout import Layout

if TYPE_CHECKING:
    from benthic.model.part import Part
    from benthic.plan.training.candidate import Candidate, Updates
    from benthic.plan.training.step import Step
    from benthic.spec.hardware import Hardware
    from benthic.spec.model import ModelConfig

Routes = tuple[tuple[int, ...], ...]

TERMS: Final = (
    "weights",
    "masters",
    "gradients",
    "moments",
    "activations",
    "working",
    "exchange",
    "reserve",
)
UPDATE: Final = 16
"""Bytes an element of the arrays of an AdamW that is not one kernel."""
LIBRARIES: Final = 2 * 32 * 2**20
"""What torch lends cuBLAS and cuBLASLt on Hopper."""

_RESERVE: Final = 0.05
"""Of activations and working memory: experts that get more than their share, rounding and holes. Spare rows
of a CUDA graph come on top, as if all of both were experts'."""
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
    found = []
    for pp in range(table.ranks):
        most = peak(candidate, held_parts(candidate, table, pp), moments(table.slots[pp]))
        found.append(Memory(pp, kept(candidate, table.routes, pp, peak_bytes(candidate, table, pp), most)))
    return tuple(found)


def held_parts(candidate: Candidate, table: Table, pp: int) -> dict[int, Part]:
    """The stages of a pipeline rank."""
    parts = parts_of(candidate.model, candidate.layout, table.stages)
    return {stage: parts[stage] for stage in stages_of(table, pp)}


def kept(candidate: Candidate, routes: Routes, pp: int, activations: float, most: float) -> dict[str, float]:
    """The terms of one pipeline rank whose activations are known, and the most beside weights to moments."""
    parts = parts_of(candidate.model, candidate.layout, len(routes[0]))
    here = tuple(parts[stage] for stage in range(len(parts)) if any(route[stage] == pp for route in routes))
    bare = replace(candidate.layout, schedule="1f1b", virtual_stages=None)
    still = replace(candidate, layout=bare, train=Rows(), rows=1, recompute=(), offload=())
    terms = dict(_static(still, routes, pp))
    terms["activations"] = float(activations)
    ending, graph = _ending(candidate, here), candidate.recorded(GPUS_OF_A_HOST)
    apart = graph and candidate.optimizer.name == "muon"  # its update borrows nothing of a graph
    terms["working"] = max(0.0, most - activations, ending - activations) + (ending if apart else 0.0)
    terms["exchange"] = _mailboxes(candidate)
    share = _RESERVE + (1 / SPARE_ROWS if graph and candidate.layout.ep_degree > 1 else 0.0)
    terms["reserve"] = LIBRARIES + share * (activations + terms["working"])
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


def _ending(candidate: Candidate, here: tuple[Part, ...]) -> float:
    """What the end of a step allocates: a bucket's reduced gradients, or the arrays of an update.

    Muon has a bucket's shard as moves, as it is sent and received, as matrices, and both ways back.
    """
    layout = replace(candidate.layout, schedule="1f1b", virtual_stages=None)
    return _ending_of(candidate.model, layout, candidate.optimizer, here)


@functools.lru_cache(maxsize=1 << 12)
def _ending_of(model: ModelConfig, layout: Layout, optimizer: Updates, here: tuple[Part, ...]) -> float:
    muon = optimizer.name == "muon"
    buckets: dict[tuple[str, str], float] = {}
    largest = 0.0
    for param in held_by(model, here):
        kind = kind_of(param)
        count = numel(param, layout) / replicas_of(layout, kind)
        largest = max(largest, count)
        each = 4.0 if layout.zero_stage == 1 and replicas_of(layout, kind) > 1 else 0.0
        if muon and param.part in MUON_PARTS:
            each = 24.0 if replicas_of(layout, kind) > 1 else 20.0
        key = unit_of(param.name), kind
        buckets[key] = buckets.get(key, 0.0) + each * count
    update = 0.0 if optimizer.fused else UPDATE * largest
    return max(update, *buckets.values(), 0.0)


def _mailboxes(candidate: Candidate) -> float:
    """Memory that ranks of one host write for each other, for the experts' rows out and home."""
    layout, model = candidate.layout, candidate.model
    if not 1 < layout.ep_degree <= GPUS_OF_A_HOST:
        return 0.0
    row = (4.0 if candidate.precision.weights == "float32" else 2.0) * model.hidden_size
    out = model.hidden_size * (1 + 4 / 128) if candidate.precision.matmul == "fp8" else row
    in_flight = 2 if layout.schedule in OVERLAPPED else 1
    each = out + row + 3 * 4.0 * model.num_experts_per_tok
    return in_flight * layout.ep_degree * tokens_of(candidate) * each
