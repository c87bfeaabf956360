"""Pages in host memory that blocks of the latent cache go to when they are evicted, and come back from.

On a GPU they are page-locked and mapped, so that one kernel on the computing stream copies all blocks of a
plan in one direction: it stores over the link to where they belong, or loads from there. Nothing is gathered
first and the host waits for nothing; that the copies come after the step before and ahead of the plan's own
is the order of the stream. On a CPU the copy is done when it returns.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from benthic.errors import ConfigError
from benthic.kernels.ops import copy_blocks
from benthic.sched.plans import BlockCopy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class HostPages:
    """Room for `num_blocks` blocks beside the pages of a device.

    Args:
        pages_LPBW: the device's pages.
        num_blocks: how many blocks the host holds; their memory is not zeroed, since none is read before it
            is written.

    Raises:
        ConfigError: the system does not lock so much memory.
    """

    def __init__(self, pages_LPBW: Tensor, num_blocks: int) -> None:
        layers, blocks, *block = pages_LPBW.shape
        self._device_LPBW = pages_LPBW
        self.pages_LPBW = torch.empty((layers, num_blocks, *block), dtype=pages_LPBW.dtype)
        # Places of one direction's copies. Allocated once, so that a full GPU cannot refuse them, and apart,
        # so that both begin where the kernel expects it whatever their number is (else it is compiled anew).
        self._place_R, self._place_on_host_R = (
            torch.empty(blocks, dtype=torch.int64, device=pages_LPBW.device) for _ in range(2)
        )
        if pages_LPBW.is_cuda:
            lock(self.pages_LPBW)
            unlock = torch.cuda.cudart().cudaHostUnregister
            weakref.finalize(self, unlock, self.pages_LPBW.data_ptr()).atexit = False
            self.move((BlockCopy(0, 0),), (BlockCopy(0, 0),))  # compiles the kernel both ways

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages_LPBW.nbytes

    @torch.inference_mode()
    def move(self, to_host: Sequence[BlockCopy], from_host: Sequence[BlockCopy]) -> None:
        """Copy blocks out, then blocks in. Each direction names a block of either side once at most."""
        if to_host:
            device_R, host_R = self._places(to_host)
            copy_blocks(self._device_LPBW, device_R, self.pages_LPBW, host_R)
        if from_host:
            device_R, host_R = self._places(from_host)
            copy_blocks(self.pages_LPBW, host_R, self._device_LPBW, device_R)

    def _places(self, copies: Sequence[BlockCopy]) -> tuple[Tensor, Tensor]:
        """Blocks on the device and on the host, as indices on the device; the next call overwrites them."""
        device, host = zip(*copies, strict=True)
        return _filled(self._place_R, device), _filled(self._place_on_host_R, host)


def _filled(place_R: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """The beginning of `place_R`, with these blocks."""
    given_R = torch.tensor(blocks, dtype=torch.int64, pin_memory=place_R.is_cuda)
    return place_R[: len(blocks)].copy_(given_R, non_blocking=True)


def lock(pages: Tensor) -> None:
    """Page-lock and map a tensor of the host for the current GPU; whoever frees it unlocks it first.

    Not by `torch.empty(pin_memory=True)`, which rounds what it locks up to a power of two.

    Raises:
        ConfigError: the system refuses; names the bytes.
    """
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(pages.data_ptr(), pages.nbytes, 0)
    if int(error) != 0:
        msg = (
            f"the system does not page-lock {pages.nbytes:,} bytes for the host cache (CUDA error "
            f"{int(error)}: {runtime.cudaGetErrorString(error)}). Lower host_cache_gib or raise `ulimit -l`."
        )
        raise ConfigError(msg)
