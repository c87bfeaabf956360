"""Hugging Face weights into the stages of a layout: every rank reads its own shard of its own part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benthic.errors import TensorMismatchError
from benthic.model.region import read_region, read_stretch, stretches
from benthic.model.tensor_check import Table, check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benthic.model.checkpoint import Opened
    from benthic.model.shards import Source
    from benthic.parallel.buckets import Piece
    from benthic.parallel.mesh import Group
    from benthic.parallel.stages import Stages
    from benthic.spec.parameters import Param


@torch.no_grad()
def load_stages(opened: Opened, stages: Stages, world: Group) -> None:
    """Set the masters of this rank to the checkpoint's weights in float32, and the running weights to these.

    Tensor by tensor; of each, only the rows and columns of this rank's ZeRO shard. Copies of shared tensors
    are compared, each rank its own stretch. Every rank must call it. Parameters that the checkpoint's config
    does not have (MTP modules that it lacks) keep their values.

    Raises:
        TensorMismatchError: tensors are missing, extra, misshapen, or copies differ; on every rank alike.
    """
    table = Table.of(opened.config)
    params = {param.name: param for param in table.params}
    differing: set[str] = set()
    with opened.source as source:
        check(source, table, whole=table, dropped_prefixes=opened.dropped_prefixes)
        reader = _Reader(source, _copies(source, table), interleaved=opened.config.rope_interleave)
        for bucket in stages.all_buckets:
            for piece in bucket.pieces():
                if piece.name in params:
                    differing |= reader.fill(piece, params[piece.name], stages.boxes[piece.name])
            bucket.publish()
        for name, bias_E in stages.named_buffers().items():
            if name in params:
                whole = (slice(0, bias_E.numel()),)
                bias_E.copy_(read_region(source, params[name].hf[0].name, whole, bias_E.device))
    _refuse_differing(opened.source, differing, world)


@dataclass(frozen=True)
class _Reader:
    """Fills pieces from a checkpoint. copies: stored copies of shared tensors, by what they should repeat."""

    source: Source
    copies: Mapping[str, tuple[str, ...]]
    interleaved: bool

    def fill(self, piece: Piece, param: Param, box: tuple[slice, ...]) -> set[str]:
        """Set a piece's master; return the copies that differ from it."""
        differing, device = set(), piece.kept.device
        for found in stretches(param, box, piece.start, piece.stop):
            own = found.tensor.name
            for name in (own, *self.copies.get(own, ())):
                values = read_stretch(
                    self.source, name, param, found, interleaved=self.interleaved, device=device
                )
                target = piece.part(found.at, values.numel())
                if name == own:
                    target.write(values)
                elif not torch.equal(target.master, values):
                    differing.add(name)
        return differing


def _copies(source: Source, table: Table) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, original in table.twins.items():
        if name in source.tensors:
            found[original.name] = (*found.get(original.name, ()), name)
    return found


def _refuse_differing(source: Source, differing: set[str], world: Group) -> None:
    everywhere: list[set[str]] = [differing] * world.size
    if world.handle is not None:
        dist.all_gather_object(everywhere, differing, group=world.handle)
    names = sorted(set().union(*everywhere))
    if names:
        message = (
            f"{source.folder}: {len(names)} tensors differ from those they should repeat: "
            f"{', '.join(names)}. The model shares them; set model.num_nextn_predict_layers=0 to leave the "
            "MTP layers unread."
        )
        raise TensorMismatchError(message)
