"""Pages on another GPU of this host, opened by an IPC handle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import torch

from benthic.errors import TransferError
from benthic.kernels.ops import copy_blocks
from benthic.serve.transfer.handshake import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
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
        self._stepped = torch.cuda.Event()
        self._recordings: dict[int, list[Recording]] = {}
        self._recording(padded(1))  # compiles the kernel before a request waits for it

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> Recording:
        """Copy blocks, all layers of them; nothing waits.

        After the step in flight, which may still write to a block that changed hands; beside the next one.
        """
        recording = self._recording(padded(len(local_blocks)))
        self._stepped.record(torch.cuda.current_stream(self._local_LPBW.device))
        self._stream.wait_event(self._stepped)
        recording.start(remote_blocks, local_blocks)
        return recording

    def _recording(self, size: int) -> Recording:
        """One of this size that is not on its way; it is made where there is none."""
        made = self._recordings.setdefault(size, [])
        free = next((recording for recording in made if recording.ended()), None)
        if free is None:
            free = Recording(self._remote_LPBW, self._local_LPBW, size, self._stream)
            made.append(free)
        return free


def padded(blocks: int) -> int:
    """The size of the recording that copies so many blocks: 8, then two sizes to each power of two."""
    power = max(8, 1 << (blocks - 1).bit_length())
    return power * 3 // 4 if power > 8 and blocks <= power * 3 // 4 else power


class Recording:
    """A copy of up to `size` blocks as a CUDA graph: the lists to the device, then the kernel.

    Called one by one, what a graph launches at once takes the host as long as the link takes for the blocks
    of a thousand tokens. The lists are read when the GPU comes to them, so they are written anew only after
    the copy before has ended. Places behind the last block hold -1, which copies nothing.
    """

    def __init__(self, remote_LPBW: Tensor, local_LPBW: Tensor, size: int, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._done = torch.cuda.Event()
        host_2R = torch.full((2, size), -1, dtype=torch.int64, pin_memory=True)
        self._lists_2R: np.ndarray[tuple[int, int], np.dtype[np.int64]] = host_2R.numpy()
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.stream(stream):
            lists_2R = torch.full((2, size), -1, device=local_LPBW.device)

            def copy() -> None:
                lists_2R.copy_(host_2R, non_blocking=True)
                copy_blocks(remote_LPBW, lists_2R[0], local_LPBW, lists_2R[1])

            copy()  # loads the kernel, which a capture must not
            self._graph.capture_begin(capture_error_mode="thread_local")
            copy()
            self._graph.capture_end()
        self._kept = (host_2R, lists_2R, remote_LPBW, local_LPBW)

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> None:
        """Launch a copy of these blocks; the one before has ended."""
        count = len(local_blocks)
        self._lists_2R[:, :count] = remote_blocks, local_blocks
        self._lists_2R[:, count:] = -1
        with torch.cuda.stream(self._stream):
            self._graph.replay()
        self._done.record(self._stream)

    def ended(self) -> bool:
        """Whether the GPU has come to the end of it."""
        return self._done.query()

    def wait(self) -> None:
        """Until it has."""
        self._done.synchronize()
