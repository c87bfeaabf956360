"""Which stages, parameters and replicas live on which rank: names and numbers, no tensors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from benthic.model.part import Part
from benthic.spec.parameters import parameters
from benthic.spec.stages import layers_of_stages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benthic.sched.pipeline.table import Table
    from benthic.spec.layout import Layout
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param


def parts_of(config: ModelConfig, layout: Layout, stages: int) -> tuple[Part, ...]:
    """What each stage holds.

    The first embeds. The last holds head and MTP modules, and for the latter a copy of the embedding, whose
    gradients are summed with those of the first.
    """
    return _parts(config, stages, layout.layers_per_stage)


@functools.lru_cache(maxsize=256)
def _parts(config: ModelConfig, stages: int, layers_per_stage: tuple[int, ...]) -> tuple[Part, ...]:
    depths = tuple(range(config.num_nextn_predict_layers))
    cut = layers_of_stages(config, stages, layers_per_stage)
    last = len(cut) - 1
    copies = bool(depths) or config.tie_word_embeddings
    return tuple(
        Part(
            layers=tuple(layers),
            embed=k == 0 or (k == last and copies),
            head=k == last,
            mtp=depths if k == last else (),
        )
        for k, layers in enumerate(cut)
    )


def stages_of(table: Table, pp_rank: int) -> tuple[int, ...]:
    """The stages that live on a pipeline rank."""
    return tuple(sorted({s for route in table.routes for s, rank in enumerate(route) if rank == pp_rank}))


@functools.lru_cache(maxsize=256)
def held_by(config: ModelConfig, parts: tuple[Part, ...]) -> tuple[Param, ...]:
    """The parameters that live in any of `parts`, each once, in the order of the network."""
    return tuple(p for p in parameters(config) if any(part.holds(p.name) for part in parts))


@functools.lru_cache(maxsize=64)
def holders_of(
    config: ModelConfig, parts: tuple[Part, ...], routes: tuple[tuple[int, ...], ...]
) -> dict[str, tuple[int, ...]]:
    """The pipeline ranks that hold each parameter; `routes` are a table's."""
    found: dict[str, set[int]] = {param.name: set() for param in parameters(config)}
    for stage, part in enumerate(parts):
        for param in held_by(config, (part,)):
            found[param.name].update(route[stage] for route in routes)
    return {name: tuple(sorted(ranks)) for name, ranks in found.items()}


def unit_of(name: str) -> str:
    """What is gathered together under ZeRO-3: embed, head (with the last norm), layers.N or mtp.K."""
    top, _, rest = name.partition(".")
    if top in {"layers", "mtp"}:
        return f"{top}.{rest.partition('.')[0]}"
    return "embed" if top == "embed" else "head"


def matrices_first(params: Iterable[Param]) -> list[Param]:
    """The order of a bucket: what weight decay touches lies side by side, so that one call updates it."""
    return sorted(params, key=lambda param: len(param.shape) < 2)


def kind_of(param: Param) -> str:
    """Which ranks of a pipeline rank hold the same part: "expert", "sharded" (by tensor) or "dense" ones."""
    if "expert" in param.axes:
        return "expert"
    return "sharded" if {"heads", "ffn"} & set(param.axes) else "dense"
