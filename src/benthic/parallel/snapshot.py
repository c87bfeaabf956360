"""Tensors of all ranks in one folder: written by one layout, read by any, with torch.distributed.checkpoint.

Planners of our own tell it which boxes of each tensor are here; the format, the exchange of plans and the
overlap of boxes are torch's. `Held` is no tensor, and torch looks up only tensors in its own planners.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import planner as plans
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from benthic.errors import CheckpointError, TensorMismatchError
from benthic.parallel.peers import where

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.futures import Future

    from benthic.parallel.boxes import Box
    from benthic.parallel.held import Held
    from benthic.parallel.peers import Peers

METADATA: Final = ".metadata"
_ALONE: Final = "torch.distributed is disabled"
_NAMED: Final = 8


def write(held: Mapping[str, Held], folder: Path, peers: Peers) -> None:
    """Write what every rank owns, flushed to disk: `__RANK_0.distcp` each, and rank 0 `.metadata`.

    Every rank calls it. A tensor that several ranks own (a router's bias) is written by the lowest of them.

    Raises:
        CheckpointError: a rank could not write, or some element is owned by no rank or by two; all raise.
    """
    if peers.size == 1:  # torch warns of it at every save
        warnings.filterwarnings("ignore", message=_ALONE, category=UserWarning)
    try:
        dcp.save(
            dict(held),
            storage_writer=_Writer(folder, sync_files=True, per_thread_copy_ahead=_copy_ahead(held)),
            planner=_SavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True),
            process_group=peers.handle,
            no_dist=peers.size == 1,
        )
    except dcp.CheckpointException as error:
        raise _failed(error, peers) from error
    except RuntimeError as error:
        raise peers.lost(error) from error


class Reader:
    """Reads boxes of the tensors in a folder that `write` made; each rank reads for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def metadata(self) -> Metadata:
        """Every tensor's shape, dtype and place in the files."""
        return dcp.FileSystemReader(self.folder).read_metadata()

    @property
    def names(self) -> frozenset[str]:
        """Every tensor there is."""
        return frozenset(self.metadata.state_dict_metadata)

    def read(self, held: Mapping[str, Held]) -> None:
        """Fill every `flat` in place.

        Raises:
            TensorMismatchError: tensors are missing, of another shape or dtype; nothing is filled then.
        """
        wrong = [line for name, one in held.items() if (line := self._problem(name, one))]
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            message = (
                f"{len(wrong)} of {len(held)} tensors differ from those in {self.folder}: "
                f"{'; '.join(wrong[:_NAMED])}{more}. "
                "Keep the model and optimizer.moment_dtype as they were."
            )
            raise TensorMismatchError(message)
        reader, planner = dcp.FileSystemReader(self.folder), _LoadPlanner(flatten_state_dict=False)
        reader.set_up_storage_reader(self.metadata, is_coordinator=False)
        planner.set_up_planner(dict(held), self.metadata, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()

    def _problem(self, name: str, one: Held) -> str:
        """What keeps a tensor from being read, empty when nothing does."""
        found = self.metadata.state_dict_metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):
            return f"{name} is missing"
        if tuple(found.size) != one.shape:
            return f"{name} is {list(found.size)} there, {list(one.shape)} here"
        if found.properties.dtype != one.dtype:
            return f"{name} is {found.properties.dtype} there, {one.dtype} here"
        return ""


class _SavePlanner(dcp.DefaultSavePlanner):
    def create_local_plan(self) -> plans.SavePlan:
        owned = {name: one for name, one in self.state_dict.items() if one.owned}
        self.plan = plans.SavePlan([item for name, one in owned.items() for item in _write_items(name, one)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        held: Held = self.state_dict[index.fqn]
        return held.chunk(index.offset)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> plans.LoadPlan:
        return plans.LoadPlan(
            [item for name, one in self.state_dict.items() for item in self._read_items(name, one)]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held: Held = self.state_dict[index.fqn]
        return held.chunk(index.offset)

    def resolve_tensor(self, read_item: plans.ReadItem) -> Tensor:
        held: Held = self.state_dict[read_item.dest_index.fqn]
        if held.weight is None:
            return super().resolve_tensor(read_item)
        return torch.empty(read_item.lengths, dtype=held.dtype, device=held.flat.device)

    def commit_tensor(self, read_item: plans.ReadItem, tensor: Tensor) -> None:
        held: Held = self.state_dict[read_item.dest_index.fqn]
        if held.weight is not None:
            ends = zip(read_item.dest_offsets, read_item.lengths, strict=True)
            held.write(read_item.dest_index.offset, tuple(slice(o, o + n) for o, n in ends), tensor)

    def _read_items(self, name: str, one: Held) -> list[plans.ReadItem]:
        assert self.metadata is not None  # noqa: S101 (set_up_planner was called)
        saved = self.metadata.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata)  # noqa: S101 (Reader.read has looked)
        return create_read_items_for_chunk_list(name, saved, [_chunk(box) for box in one.boxes])


class _Writer(dcp.FileSystemWriter):
    """Writes equal files in equal runs (no random id, no folder's name) and tells what the disk said."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()

    def write_data(self, plan: plans.SavePlan, planner: plans.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save hides a full disk behind "unexpected pos"
            raise _root(error) from error


def _root(error: BaseException) -> BaseException:
    """What the operating system said, where that is behind `error`; else `error`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def _write_items(name: str, one: Held) -> Iterator[plans.WriteItem]:
    properties = TensorProperties(dtype=one.dtype)
    for box in one.boxes:
        yield plans.WriteItem(
            index=MetadataIndex(name, torch.Size(box.offsets)),
            type=plans.WriteItemType.SHARD,
            tensor_data=plans.TensorWriteData(_chunk(box), properties, torch.Size(one.shape)),
        )


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def _copy_ahead(held: Mapping[str, Held]) -> int:
    """Bytes to copy from a GPU while others are written; 0 for host memory.

    With more than 0 torch asks for the current CUDA stream, which in a new thread is one of GPU 0.
    """
    return 10_000_000 if any(one.flat.is_cuda for one in held.values()) else 0


def _failed(error: dcp.CheckpointException, peers: Peers) -> CheckpointError:
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    kind = "" if isinstance(cause, OSError) else f"{type(cause).__name__}: "
    return CheckpointError(f"{where(rank, peers.size, len(error.failures))}{kind}{cause}")
