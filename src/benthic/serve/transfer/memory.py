"""Pages that another process on this host can read: an anonymous file that both map.

The file has no name in any folder, so nothing is left behind however its owner ends; a reader opens it
through the owner's process (`/proc/PID/fd/N`, which the kernel permits to the same user alone).
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import torch

from benthic.errors import TransferError
from benthic.serve.transfer.handshake import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Copy(Protocol):
    """Blocks on their way. Until it has ended, nobody may touch those that it writes."""

    def ended(self) -> bool:
        """Whether the blocks are there. Raises: TransferError when they will not come."""
        ...

    def wait(self) -> None:
        """Until it writes nothing more, whether it brought the blocks or not."""
        ...


class Copied:
    """A copy that was made at once."""

    def ended(self) -> bool:
        """It has."""
        return True

    def wait(self) -> None:
        """Nothing is left to wait for."""


class Source(Protocol):
    """Another instance's pages. The one seam between the transfer and what moves it."""

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> Copy:
        """Copy blocks of the other instance into blocks of this one, all layers of them.

        Raises:
            TransferError: the other side cannot be read.
        """
        ...


class Opener(Protocol):
    """An instance's pages on all of its ranks."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """How others read them, by rank; every rank holds the same blocks."""
        ...

    def open(self, instance_id: str, regions: Sequence[Region]) -> Source:
        """Map another instance's pages, so that blocks can be copied from there to here.

        Raises:
            TransferError: they cannot be read here.
        """
        ...

    def close(self, instance_id: str) -> None:
        """Let another instance's pages go; those that were never opened are ignored."""
        ...


def pull(source: Source, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> None:
    """Copy and wait. Raises: TransferError."""
    copy = source.start(remote_blocks, local_blocks)
    copy.wait()
    if not copy.ended():
        msg = f"{len(local_blocks)} blocks were waited for, and have not come."
        raise TransferError(msg)


class Handle(msgspec.Struct, frozen=True):
    """How to open a mapped file: the owner's process, its descriptor, and the bytes."""

    pid: int
    descriptor: int
    num_bytes: int


class MappedPages:
    """Zeroed memory of `num_bytes` that other processes of the same user can map.

    Raises:
        TransferError: the system has no anonymous files (they are Linux's) or no memory.
    """

    def __init__(self, num_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            msg = "sharing pages between processes on a CPU needs memfd_create, which Linux alone has."
            raise TransferError(msg)
        self._descriptor = os.memfd_create("benthic-pages", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, num_bytes)
        self._map = mmap.mmap(self._descriptor, num_bytes)
        self._num_bytes = num_bytes

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The memory as a tensor; it lives as long as the tensor does."""
        return torch.frombuffer(self._map, dtype=dtype).view(*shape)

    def region(self, num_blocks: int) -> Region:
        """What a reader needs to open it."""
        handle = Handle(os.getpid(), self._descriptor, self._num_bytes)
        return Region(kind="memory", num_blocks=num_blocks, handle=msgspec.msgpack.encode(handle))


class MemorySource:
    """Reads the mapped pages of another process.

    Args:
        region: what its owner said.
        pages_LPBW: pages of this instance, on the CPU.

    Raises:
        TransferError: the owner is gone or its file has another size.
    """

    def __init__(self, region: Region, pages_LPBW: Tensor) -> None:
        handle = msgspec.msgpack.decode(region.handle, type=Handle)
        self._local_LPb = _blocks(pages_LPBW.view(torch.uint8).numpy())
        layers, _, block_bytes = self._local_LPb.shape
        expected = layers * region.num_blocks * block_bytes
        if handle.num_bytes != expected:
            msg = f"the other instance shares {handle.num_bytes:,} bytes, but its terms make {expected:,}."
            raise TransferError(msg)
        mapped = np.frombuffer(_open(handle), dtype=np.uint8)
        self._remote_LPb = mapped.reshape(layers, region.num_blocks, block_bytes)

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> Copied:
        """Copy blocks, at once."""
        self._local_LPb[:, list(local_blocks)] = self._remote_LPb[:, list(remote_blocks)]
        return Copied()


def _blocks(pages: np.ndarray) -> np.ndarray:
    layers, blocks = pages.shape[:2]
    return pages.reshape(layers, blocks, -1)


def _open(handle: Handle) -> mmap.mmap:
    path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        msg = f"process {handle.pid} does not share its pages any more ({path}: {error.strerror})."
        raise TransferError(msg) from error
    try:
        return mmap.mmap(descriptor, handle.num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
