"""Pages on another GPU of this host, opened by an IPC handle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from benthic.errors import TransferError
from benthic.kernels.ops import copy_blocks
from benthic.serve.transfer.handshake import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Shared = tuple[int, bytes, int, int, bytes, int, bytes, bool]
"""What `UntypedStorage._share_cuda_` gives: device, memory handle, bytes, offset, the reference counter's
handle and offset, event handle, and whether to wait for it."""


def region_of(pages_LPBW: Tensor) -> Region:
    """The IPC handle of a cache on a GPU; its owner must keep the tensor."""
    shared = pages_LPBW.untyped_storage()._share_cuda_()
    return Region(kind="cuda", num_blocks=pages_LPBW.shape[1], handle=msgspec.msgpack.encode(shared))


class CudaSource:
    """Reads the pages of another process on this host, over NVLink or PCIe.

    The pages are mapped into this instance's GPU, whichever GPU they are on, so that one kernel here loads
    them over the link and stores them where they belong: nothing is gathered first, and no context is opened
    on the owner's GPU.

    Args:
        region: what its owner said.
        pages_LPBW: pages of this instance.

    Raises:
        TransferError: the handle cannot be opened here, or holds less than its terms say.
    """

    def __init__(self, region: Region, pages_LPBW: Tensor) -> None:
        self._local_LPBW = pages_LPBW
        near = pages_LPBW.device
        layers, _, block_size, width = pages_LPBW.shape
        shape = (layers, region.num_blocks, block_size, width)
        _, *handle = msgspec.msgpack.decode(region.handle, type=Shared)
        try:
            storage = torch.UntypedStorage._new_shared_cuda(near.index, *handle)  # noqa: SLF001
        except RuntimeError as error:
            msg = f"the other instance's pages cannot be opened on {near}: {error}."
            raise TransferError(msg) from error
        remote = torch.empty(0, dtype=pages_LPBW.dtype, device=near).set_(storage)
        if remote.numel() < math.prod(shape):
            msg = f"the other instance shares {remote.numel():,} elements, but its terms make {shape}."
            raise TransferError(msg)
        self._remote_LPBW = remote[: math.prod(shape)].view(shape)
        self._stream = torch.cuda.Stream(near)
        self._launched = torch.cuda.Event()
        self._trips: dict[int, list[Trip]] = {}

    @torch.inference_mode()
    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> OnStream:
        """Copy blocks, all layers of them; nothing waits.

        After the step in flight, which may still write to a block that changed hands; beside the next one.
        """
        trip = self._trip(len(local_blocks))
        trip.fill(remote_blocks, local_blocks)
        self._launched.record(torch.cuda.current_stream(self._local_LPBW.device))
        self._stream.wait_event(self._launched)
        with torch.cuda.stream(self._stream):
            trip.graph.replay()
            trip.done = torch.cuda.Event()
            trip.done.record()
        return OnStream(trip.done)

    def _trip(self, count: int) -> Trip:
        """A recorded copy of so many blocks or more that is not on its way."""
        size = max(LEAST_BLOCKS, 1 << (count - 1).bit_length())
        trips = self._trips.setdefault(size, [])
        for trip in trips:
            if trip.done is None or trip.done.query():
                return trip
        trips.append(self._record(size))
        return trips[-1]

    def _record(self, size: int) -> Trip:
        """Record a copy of `size` blocks, which costs the host a millisecond and every copy by it a tenth."""
        near = self._local_LPBW.device
        lists_2R = torch.full((2, size), -1, dtype=torch.int64, pin_memory=True)
        sent_2R = torch.full((2, size), -1, dtype=torch.int64, device=near)
        self._stream.wait_stream(torch.cuda.current_stream(near))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            copy_blocks(self._remote_LPBW, sent_2R[0], self._local_LPBW, sent_2R[1])  # compiles; skips all
            graph.capture_begin(capture_error_mode="thread_local")
            sent_2R.copy_(lists_2R, non_blocking=True)
            copy_blocks(self._remote_LPBW, sent_2R[0], self._local_LPBW, sent_2R[1])
            graph.capture_end()
        return Trip(lists_2R, sent_2R, graph)


LEAST_BLOCKS = 8
"""Blocks of the smallest recorded copy; the others are twice as large each."""


@dataclass(eq=False)
class Trip:
    """A recorded copy: which blocks, in memory of the host and of the device, and the end of its last use."""

    lists_2R: Tensor
    sent_2R: Tensor
    graph: torch.cuda.CUDAGraph
    done: torch.cuda.Event | None = None

    def fill(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> None:
        """Say which blocks; what is left of the lists is skipped."""
        count, lists_2R = len(local_blocks), self.lists_2R.numpy()
        lists_2R[:, :count] = remote_blocks, local_blocks
        lists_2R[:, count:] = [[0], [-1]]


class OnStream(NamedTuple):
    """A copy whose end an event marks."""

    done: torch.cuda.Event

    def ended(self) -> bool:
        """Whether the GPU has come to the event."""
        return self.done.query()

    def wait(self) -> None:
        """Until it has."""
        self.done.synchronize()
