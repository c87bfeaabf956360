"""Pages on another GPU of this host, opened by an IPC handle."""

from __future__ import annotations

import math
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

    @torch.inference_mode()
    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> OnStream:
        """Copy blocks, all layers of them; nothing waits.

        After the step in flight, which may still write to a block that changed hands; beside the next one.
        """
        count = len(local_blocks)
        even = count + count % 2  # both lists then begin where the kernel was compiled for
        lists_2R = torch.empty((2, even), dtype=torch.int64, pin_memory=True)
        lists_2R.numpy()[:, :count] = remote_blocks, local_blocks
        self._launched.record(torch.cuda.current_stream(self._local_LPBW.device))
        self._stream.wait_event(self._launched)
        with torch.cuda.stream(self._stream):
            from_R, to_R = lists_2R.to(self._local_LPBW.device, non_blocking=True)[:, :count]
            copy_blocks(self._remote_LPBW, from_R, self._local_LPBW, to_R)
            done = torch.cuda.Event()
            done.record()
        return OnStream(done)


class OnStream(NamedTuple):
    """A copy whose end an event marks."""

    done: torch.cuda.Event

    def ended(self) -> bool:
        """Whether the GPU has come to the event."""
        return self.done.query()

    def wait(self) -> None:
        """Until it has."""
        self.done.synchronize()
