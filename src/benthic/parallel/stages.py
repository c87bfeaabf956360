"""Builds the stages of one rank: the same network, holding only this rank's part of every parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.parallel.buckets import Bucket
from benthic.parallel.parts import holders_of, kind_of, matrices_first, parts_of, stages_of, unit_of
from benthic.spec.layout import box
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from benthic.model.part import Part
    from benthic.parallel.mesh import Group, Mesh
    from benthic.sched.pipeline.table import Table
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param

Boxes = dict[str, tuple[slice, ...]]


@dataclass(frozen=True)
class Stages:
    """The stages of this rank and its part of every parameter.

    models: by stage. boxes: the part of each parameter that is held here. buckets: by unit (embed, layers.N,
    head, mtp.K), all parameters once; a parameter that two of these stages hold is one tensor. holders: the
    pipeline ranks that hold each parameter, of the whole model.
    """

    models: Mapping[int, DeepSeek]
    boxes: Boxes
    buckets: Mapping[str, tuple[Bucket, ...]]
    holders: Mapping[str, tuple[int, ...]]

    @property
    def all_buckets(self) -> Iterator[Bucket]:
        """Every bucket, in the order of the network on every rank."""
        for unit in self.buckets.values():
            yield from unit

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of this rank by name, once."""
        return {n: p for model in self.models.values() for n, p in model.named_parameters()}

    def named_buffers(self) -> dict[str, torch.Tensor]:
        """The routers' biases by name; a layer's bias may live in one stage of this rank only."""
        params = self.named_parameters()
        return {n: t for m in self.models.values() for n, t in m.state_dict().items() if n not in params}


def build(
    config: ModelConfig,
    table: Table,
    mesh: Mesh,
    *,
    device: torch.device,
    keep: Callable[[DeepSeek], None],
    seed: int | None,
    fp8: bool = False,
    split: bool = False,
) -> Stages:
    """Allocate and initialise what this rank holds; the weights do not depend on the layout.

    `keep` brings the parameters of a model to the dtypes that they are kept in; with `fp8`, products read
    FP8 copies of the float32 ones; with `split`, masters of the bfloat16 ones are kept as remainders.
    `seed=None` leaves zeros, for weights that are about to be loaded.
    """
    layout, place = mesh.layout, mesh.place
    parts = parts_of(config, layout, table.stages)
    boxes = {param.name: box(param, layout, place) for param in parameters(config)}
    models = {s: _stage(config, parts[s], boxes, device, keep) for s in stages_of(table, place.pp)}
    _share(models)
    for model in models.values():
        _fill(model, seed, boxes)
    named = {n: p for model in models.values() for n, p in model.named_parameters()}
    held = [param for param in parameters(config) if param.name in named]
    holders = holders_of(config, parts, table.routes)
    groups = {pps: mesh.partners(pps) for pps in sorted(set(holders.values()))}
    buckets: dict[str, list[Bucket]] = {}
    for (unit, pps, _, _), members in _grouped(held, holders, named).items():
        named_here = {param.name: named[param.name] for param in matrices_first(members)}
        replicas, copied = _replicas(members[0], mesh), fp8 and members[0].fp8
        bucket = Bucket(
            named_here, replicas, groups[pps], zero_stage=layout.zero_stage, copied=copied, split=split
        )
        buckets.setdefault(unit, []).append(bucket)
    return Stages(models, boxes, {unit: tuple(found) for unit, found in buckets.items()}, holders)


def _stage(
    config: ModelConfig,
    part: Part,
    boxes: Boxes,
    device: torch.device,
    keep: Callable[[DeepSeek], None],
) -> DeepSeek:
    """One stage with unfilled memory, on `device`."""
    with torch.device("meta"):
        model = DeepSeek(config, part)
    for name, param in list(model.named_parameters()):
        shape = tuple(piece.stop - piece.start for piece in boxes[name])
        _replace(model, name, nn.Parameter(param.new_empty(shape)))
    model.to_empty(device=device)
    keep(model)
    return model


def _fill(model: DeepSeek, seed: int | None, boxes: Boxes) -> None:
    if seed is not None:
        initialise(model, seed, boxes)
        return
    for tensor in model.state_dict().values():
        tensor.zero_()


def _replace(model: nn.Module, name: str, param: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, param)


def _share(models: Mapping[int, DeepSeek]) -> None:
    """Make parameters of equal name one tensor, as the embedding of the first and the last stage."""
    seen: dict[str, nn.Parameter] = {}
    for model in models.values():
        for name, param in list(model.named_parameters()):
            if seen.setdefault(name, param) is not param:
                _replace(model, name, seen[name])


Key = tuple[str, tuple[int, ...], str, torch.dtype]


def _grouped(
    held: list[Param], holders: Mapping[str, tuple[int, ...]], named: Mapping[str, nn.Parameter]
) -> dict[Key, list[Param]]:
    """Parameters with equal unit, holders, kind of replicas and dtype."""
    found: dict[Key, list[Param]] = {}
    for param in held:
        if param.trainable:
            dtype = named[param.name].dtype
            key = (unit_of(param.name), holders[param.name], kind_of(param), dtype)
            found.setdefault(key, []).append(param)
    return found


def _replicas(param: Param, mesh: Mesh) -> Group:
    """The ranks of this pipeline rank that hold the same part of `param`."""
    return {"expert": mesh.expert_dp, "sharded": mesh.sharded, "dense": mesh.dense}[kind_of(param)]
