"""The paged latent cache: one tensor that holds, for every layer and slot, the latent and the rotated key.

A token costs `layers * (kv_lora_rank + qk_rope_head_dim)` elements (DeepSeek-V2 report Table 1: equal to
grouped attention with 2.25 groups). MTP layers have pages of their own when they draft (FlashMLA counts 62
layers for V3).

Shape suffixes: L layers, P blocks, B tokens in a block, W latent dim followed by rotary dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.errors import ConfigError
from benthic.serve.host_pages import HostPages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benthic.sched.plans import BlockCopy
    from benthic.serve.transfer.memory import MappedPages
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How large one block is; everything that sizing needs, without a tensor."""

    layers: int
    latent_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: ModelConfig, *, block_size: int, dtype: torch.dtype, mtp_layers: int = 0
    ) -> CacheLayout:
        """The layout of a model's cache, with `mtp_layers` extra layers for drafting."""
        layers = config.num_hidden_layers + mtp_layers
        return cls(layers=layers, latent_dim=config.latent_dim, block_size=block_size, dtype=dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes that one cached token takes over all layers."""
        return self.layers * self.latent_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_size * self.token_bytes


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """How many blocks there are, and the sentence that says why."""

    num_blocks: int
    reason: str


def size_by_bytes(layout: CacheLayout, budget: int, *, source: str) -> CacheSize:
    """As many blocks as `budget` bytes hold.

    Raises:
        ConfigError: not even one block fits; names both numbers and `source`, where the budget came from.
    """
    num_blocks = budget // layout.block_bytes
    if num_blocks < 1:
        msg = (
            f"the latent cache may take {budget:,} bytes ({source}), but one block of {layout.block_size} "
            f"tokens takes {layout.block_bytes:,}. Give the cache more memory or choose a smaller block_size."
        )
        raise ConfigError(msg)
    return CacheSize(
        num_blocks=num_blocks,
        reason=f"{num_blocks:,} blocks x {layout.block_size} tokens x {layout.token_bytes:,} B/token "
        f"in {budget:,} bytes ({source})",
    )


def size_by_utilization(
    layout: CacheLayout, device: torch.device, *, utilization: float, reserve: int
) -> CacheSize:
    """What `utilization` of the GPU's memory leaves once the weights are loaded and `reserve` bytes are kept.

    Args:
        layout: size of a block.
        device: the CUDA device that already holds the weights.
        utilization: share of the device's total memory that this process may use, 0 to 1.
        reserve: bytes kept for activations (and whatever other processes do not show).
    """
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    budget = int(total * utilization) - used - reserve
    source = f"{utilization:.2f} x {total:,} total - {used:,} in use - {reserve:,} for activations"
    return size_by_bytes(layout, max(budget, 0), source=source)


class LatentCache:
    """The pages of every layer.

    Args:
        layout: size of a block.
        num_blocks: how many there are.
        device: where they live. The memory is zeroed: an unwritten slot is masked, never multiplied by
        garbage NaNs.
        memory: where the pages lie, if other processes are to read them (on a CPU; on a GPU all can be read).
        host_blocks: blocks of host memory that evicted ones go to.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_blocks: int,
        device: torch.device,
        memory: MappedPages | None = None,
        host_blocks: int = 0,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.memory = memory
        shape = (layout.layers, num_blocks, layout.block_size, layout.latent_dim)
        if memory is None:
            self.pages_LPBW = torch.zeros(shape, dtype=layout.dtype, device=device)
        else:
            self.pages_LPBW = memory.tensor(shape, layout.dtype)
        self._layers = tuple(self.pages_LPBW.unbind(0))
        self.host = HostPages(self.pages_LPBW, host_blocks) if host_blocks else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_blocks * self.layout.block_bytes

    def move(self, to_host: Sequence[BlockCopy], from_host: Sequence[BlockCopy]) -> None:
        """Make the copies of a plan between these pages and the host's, in the order of the device's work."""
        assert self.host is not None  # noqa: S101 (the scheduler copies only where it was told of host blocks)
        self.host.move(to_host, from_host)

    def layer(self, index: int) -> Tensor:
        """The pages of one layer, [blocks, block_size, latent + rope]."""
        return self._layers[index]

    def slots(self, index: int) -> Tensor:
        """One layer's pages as rows, [blocks * block_size, latent + rope], addressed by slot."""
        return self._layers[index].view(-1, self.layout.latent_dim)

    def read(self, index: int, slot_M: Tensor) -> Tensor:
        """Rows of one layer by slot, as they are stored; torch moves FP8 by index as bytes alone."""
        rows = self.slots(index)
        if rows.dtype != torch.float8_e4m3fn:
            return rows.index_select(0, slot_M)
        return rows.view(torch.uint8).index_select(0, slot_M).view(rows.dtype)
