"""A Hugging Face checkpoint from any layout, tensor by tensor: the owners of its parts send them to rank 0.

Rank 0 writes alone, so that only its disk is needed and the files are byte for byte those of one process
(FP8 blocks cross the borders of tensor-parallel parts, so parts cannot be quantised where they are). No rank
holds more than its own part and one tensor. Cost: the model's bytes through rank 0 once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from benthic.errors import CheckpointError
from benthic.model.checkpoint import MAX_SHARD_BYTES
from benthic.model.export import Format, in_file_order
from benthic.model.rope_layout import to_interleaved
from benthic.model.shard_writer import ShardWriter
from benthic.model.shards import CONFIG_FILE
from benthic.parallel.parts import unit_of
from benthic.spec.hf import to_hf
from benthic.spec.layout import box
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from benthic.parallel.buckets import Bucket
    from benthic.parallel.mesh import Mesh
    from benthic.parallel.stages import Stages
    from benthic.spec.layout import Layout
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import HFTensor, Param

_WRITER = 0


class Source(NamedTuple):
    """Part `region` of a tensor lies at `at` of the parameter of `rank`."""

    rank: int
    at: tuple[int, ...]
    region: tuple[slice, ...]


Holding = tuple[int, tuple[slice, ...]]


def holdings(param: Param, layout: Layout, pp: int) -> list[Holding]:
    """The parts into which pipeline rank `pp` cuts a parameter, each with the lowest rank that holds it."""
    found: dict[tuple[tuple[int, int], ...], Holding] = {}
    for inner in range(layout.ranks_per_stage):
        rank = layout.rank_at(pp, inner)
        held = box(param, layout, layout.place(rank))
        found.setdefault(tuple((s.start, s.stop) for s in held), (rank, held))
    return list(found.values())


def sources(tensor: HFTensor, held: Iterable[Holding]) -> Iterator[Source]:
    """Where the parts of a tensor are, of the parameter that is cut like this."""
    depth = len(tensor.index)
    for rank, whole in held:
        leading, region = whole[:depth], whole[depth:]
        if all(s.start <= i < s.stop for i, s in zip(tensor.index, leading, strict=True)):
            at = tuple(i - s.start for i, s in zip(tensor.index, leading, strict=True))
            yield Source(rank, at, region)


def save_stages(
    stages: Stages,
    mesh: Mesh,
    config: ModelConfig,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the running weights of all ranks as one Hugging Face checkpoint; every rank must call it.

    The files equal those of `save_pretrained` of the whole model bit for bit.

    Args:
        stages: what this rank holds.
        mesh: the ranks.
        config: of the whole model.
        path: the folder, on rank 0's disk; created if needed, and refused if it already holds a checkpoint.
        dtype: type of the weights that are not quantised.
        fp8: store matrices as float8_e4m3fn with 128 x 128 block scales.
        max_shard_bytes: largest file.

    Raises:
        CheckpointError: the folder is taken or the disk is full; on every rank, and nothing is left behind.
    """
    form = Format(dtype, fp8)
    pairs = in_file_order(parameters(config))
    planned = [item for _, tensor in pairs for item in form.plan(tensor)]
    values = _Gathering(stages, mesh, config).run(pairs)
    with ExitStack() as stack:
        writers: list[ShardWriter] = []

        def begin() -> None:
            writers.append(stack.enter_context(ShardWriter(path, planned, max_shard_bytes)))

        def write() -> None:
            for tensor, value in values:
                for name, stored in form.encode(tensor, value):
                    writers[0].write(name, stored)
            writers[0].write_json(CONFIG_FILE, to_hf(config, dtype=form.dtype_name, fp8=fp8))
            stack.close()

        _on_writer(mesh, begin, values=())
        _on_writer(mesh, write, values)


def _on_writer(mesh: Mesh, run: Callable[[], None], values: Iterable[object]) -> None:
    """Call `run` on rank 0 and fail on every rank if it failed there.

    Every rank goes through `values`, in which the others send; after a failure rank 0 must still receive.
    """
    told: list[str | None] = [None]
    try:
        if mesh.rank == _WRITER:
            run()
    except (CheckpointError, OSError) as error:
        told = [str(error)]
    for _ in values:
        pass
    if mesh.world.handle is not None:
        dist.broadcast_object_list(told, src=mesh.world.ranks[_WRITER], group=mesh.world.handle)
    if told[0] is not None:
        raise CheckpointError(told[0])


@dataclass(frozen=True)
class _Gathering:
    """Brings tensors together on rank 0, one after another in the same order on every rank."""

    stages: Stages
    mesh: Mesh
    config: ModelConfig

    def run(self, pairs: list[tuple[Param, HFTensor]]) -> Iterator[tuple[HFTensor, Tensor]]:
        """Every tensor, on rank 0; on other ranks nothing, but they must run through it."""
        local = {**self.stages.named_parameters(), **self.stages.named_buffers()}
        dtypes = _dtypes(local, self.mesh)
        buckets: tuple[Bucket, ...] = ()
        unit, cut = "", ("", list[Holding]())
        for param, tensor in pairs:
            if unit_of(param.name) != unit:
                unit = unit_of(param.name)
                buckets = self._hold(self.stages.buckets.get(unit, ()), buckets)
            if cut[0] != param.name:
                cut = param.name, holdings(param, self.mesh.layout, self.stages.holders[param.name][0])
            with torch.no_grad():
                found = list(sources(tensor, cut[1]))
                device = _device(self.stages) if self.mesh.rank == _WRITER else "meta"
                whole = torch.empty(tensor.shape, dtype=dtypes[param.name], device=device)
                value = self._fill(whole, found, local.get(param.name))
                if value is not None and param.rope_rows and self.config.rope_interleave:
                    value = to_interleaved(value, param)
            if value is not None:
                yield tensor, value
        self._hold((), buckets)

    def _hold(self, wanted: tuple[Bucket, ...], before: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
        """Let go of one unit's weights and have another's (ZeRO-3 shards them)."""
        for bucket in before:
            bucket.release()
        for bucket in wanted:
            bucket.acquire()
        return wanted

    def _fill(self, whole: Tensor, found: list[Source], local: Tensor | None) -> Tensor | None:
        """Bring the parts of one tensor into `whole` on rank 0; None on others."""
        rank = self.mesh.rank
        for source in found:
            here = whole[source.region]
            if source.rank == rank and local is not None:
                if rank == _WRITER:
                    here.copy_(local[source.at])
                else:
                    _send(local[source.at], self.mesh)
            elif rank == _WRITER:
                here.copy_(_receive(here, source.rank, self.mesh))
        return whole if rank == _WRITER else None


def _dtypes(local: Mapping[str, Tensor], mesh: Mesh) -> dict[str, torch.dtype]:
    """What every tensor of the model is kept in, also those that this rank does not hold."""
    own = {name: tensor.dtype for name, tensor in local.items()}
    found = [own] * mesh.world.size
    if mesh.world.handle is not None:
        dist.all_gather_object(found, own, group=mesh.world.handle)
    return {name: dtype for each in found for name, dtype in each.items()}


def _device(stages: Stages) -> torch.device:
    return next(iter(stages.named_parameters().values())).device


def _send(part: Tensor, mesh: Mesh) -> None:
    data = part.contiguous().reshape(-1).view(torch.uint8)
    dist.send(data, mesh.world.ranks[_WRITER], group=mesh.world.handle)


def _receive(like: Tensor, rank: int, mesh: Mesh) -> Tensor:
    part = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.recv(part.view(-1).view(torch.uint8), rank, group=mesh.world.handle)
    return part
