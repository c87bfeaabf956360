"""What each rank of a layout would keep in memory, from the parameter table alone: nothing is allocated.

The same arithmetic as `parallel.buckets`: parameters of a unit with equal holders and replicas share a flat
array, padded to whole shards, of which ZeRO keeps parts. Masters of FP8 copies are sharded wherever there are
several replicas, and are the weights themselves where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.parallel.activations import peak_bytes
from benthic.parallel.parts import held_by, holders_of, kind_of, matrices_first, parts_of, stages_of, unit_of
from benthic.parallel.setup import MUON_PARTS
from benthic.sched.pipeline.simulate import peak_activations
from benthic.spec.layout import box

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.parallel.setup import Setup
    from benthic.sched.pipeline.table import Table
    from benthic.spec.layout import Layout
    from benthic.spec.parameters import Param

_BYTES: Final = {"float32": 4, "bfloat16": 2}
TERMS: Final = ("weights", "masters", "gradients", "moments", "activations")
ACTIVATIONS_RULE: Final = (
    "activations are what the microbatches in flight keep for their backward, every saved tensor counted "
    "(benthic.parallel.activations); beside what is listed a rank needs room for logits, for one block's "
    "backward, for transfers and for gathered weights: a unit's under ZeRO-3, or its float32 masters while "
    "FP8 copies of them are made"
)


@dataclass(frozen=True)
class Footprint:
    """One rank's parameters, and bytes by term; `peak` is how many microbatches its stages hold at most."""

    rank: int
    parameters: int
    bytes: dict[str, int]
    peak: int

    @property
    def total(self) -> int:
        """All terms."""
        return sum(self.bytes.values())


def footprints(config: Setup, table: Table) -> tuple[Footprint, ...]:
    """The first rank of every pipeline rank; its neighbours keep as much, but for ends of shards."""
    peaks = peak_activations(table)
    found = []
    for pp in range(table.ranks):
        kept = kept_bytes(config, table, pp) | {"activations": peak_bytes(config, table, pp)}
        rank = config.layout.rank_at(pp, 0)
        count = sum(_numel(param, config.layout, rank) for param in _held(config, table, pp))
        found.append(Footprint(rank, count, kept, peaks[pp]))
    return tuple(found)


def kept_bytes(config: Setup, table: Table, pp: int) -> dict[str, int]:
    """What the first rank of a pipeline rank keeps whatever runs: all terms but activations.

    Of the table only its routes matter.
    """
    layout = config.layout
    rank = layout.rank_at(pp, 0)
    held = list(_held(config, table, pp))
    found = dict.fromkeys(TERMS[:-1], 0)
    for params, replicas, narrow in _buckets(config, held, table):
        counts = [_numel(param, layout, rank) for param in params]
        shard = -(-sum(counts) // replicas)
        flat = shard * replicas
        copied = config.precision.weights == "fp8" and not narrow
        if narrow:
            found["masters"] += (2 if config.optimizer.store_param_remainders else 4) * shard
        found["masters"] += 4 * shard if copied and replicas > 1 else 0
        if copied:
            found["weights"] += 2 * sum(counts) + (4 * flat if replicas == 1 else 0)
        else:
            found["weights"] += (2 if narrow else 4) * (shard if layout.zero_stage == 3 else flat)
        found["gradients"] += 4 * (flat if layout.zero_stage == 1 else shard)
        found["moments"] += _BYTES[config.optimizer.moment_dtype] * _moments(config, params, counts, shard)
    return found


def _held(config: Setup, table: Table, pp: int) -> Iterator[Param]:
    """The trainable parameters of a pipeline rank's stages, each once."""
    parts = parts_of(config.model, config.layout, table.stages)
    here = tuple(parts[stage] for stage in stages_of(table, pp))
    return (param for param in held_by(config.model, here) if param.trainable)


def _buckets(config: Setup, held: list[Param], table: Table) -> Iterator[tuple[list[Param], int, bool]]:
    """Each bucket's parameters in its order, its replicas here, and whether it is rounded from masters."""
    holders = holders_of(config.model, parts_of(config.model, config.layout, table.stages), table.routes)
    found: dict[tuple[str, tuple[int, ...], str, bool], list[Param]] = {}
    for param in held:
        key = unit_of(param.name), holders[param.name], kind_of(param), _narrow(config, param)
        found.setdefault(key, []).append(param)
    for (_, _, kind, narrow), params in found.items():
        yield matrices_first(params), replicas_of(config.layout, kind), narrow


def _moments(config: Setup, params: list[Param], counts: list[int], shard: int) -> int:
    """Elements of moments for the first shard, which the first rank updates: Muon keeps one, AdamW two."""
    at = elements = 0
    for param, count in zip(params, counts, strict=True):
        one = config.optimizer.name == "muon" and param.part in MUON_PARTS
        elements += max(0, min(at + count, shard) - at) * (1 if one else 2)
        at += count
    return elements


def replicas_of(layout: Layout, kind: str) -> int:
    """Ranks of one pipeline rank that hold the same part of a parameter."""
    sizes = {"expert": layout.expert_dp_degree, "sharded": layout.ranks_per_stage // layout.tp_degree}
    return sizes.get(kind, layout.ranks_per_stage)


def _numel(param: Param, layout: Layout, rank: int) -> int:
    count = 1
    for piece in box(param, layout, layout.place(rank)):
        count *= piece.stop - piece.start
    return count


def _narrow(config: Setup, param: Param) -> bool:
    """Whether its weights are bfloat16 beside a master; under FP8 those of linear layers are FP8 copies."""
    weights = config.precision.weights
    return weights == "bfloat16" or (weights == "fp8" and not param.fp8)
