"""Pages on another GPU of this host, opened by an IPC handle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from benthic.errors import TransferError
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

    Cost: the pages are gathered on the owner's GPU, and that copy then crosses the link.

    Args:
        region: what its owner said.
        pages_LPBW: pages of this instance.

    Raises:
        TransferError: the handle cannot be opened here, or holds less than its terms say.
    """

    def __init__(self, region: Region, pages_LPBW: Tensor) -> None:
        self._local_LPBW = pages_LPBW
        layers, _, block_size, width = pages_LPBW.shape
        shape = (layers, region.num_blocks, block_size, width)
        shared = msgspec.msgpack.decode(region.handle, type=Shared)
        try:
            storage = torch.UntypedStorage._new_shared_cuda(*shared)  # noqa: SLF001
        except RuntimeError as error:
            msg = f"the other instance's pages cannot be opened on {pages_LPBW.device}: {error}."
            raise TransferError(msg) from error
        remote = torch.empty(0, dtype=pages_LPBW.dtype, device=storage.device).set_(storage)
        if remote.numel() < layers * region.num_blocks * block_size * width:
            msg = f"the other instance shares {remote.numel():,} elements, but its terms make {shape}."
            raise TransferError(msg)
        self._remote_LPBW = remote[: layers * region.num_blocks * block_size * width].view(shape)

    @torch.inference_mode()
    def pull(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> None:
        """Copy blocks, all layers of them."""
        far, near = self._remote_LPBW.device, self._local_LPBW.device
        remote_R = torch.tensor(remote_blocks, device=far)
        local_R = torch.tensor(local_blocks, device=near)
        moved_LRBW = self._remote_LPBW.index_select(1, remote_R).to(near)
        self._local_LPBW.index_copy_(1, local_R, moved_LRBW)
        torch.cuda.synchronize(near)
