"""The pages of one process: how other instances read them, and how it reads theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from benthic.errors import TransferError
from benthic.serve.transfer import cuda
from benthic.serve.transfer.memory import MemorySource, Source
from benthic.serve.transfer.nixl import NixlPages, NixlSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.serve.cache import LatentCache
    from benthic.serve.transfer.handshake import Region

Mover = Literal["host", "nixl"]
"""What moves blocks: shared memory or CUDA IPC on this host, or NIXL between hosts."""


class Pages:
    """The pages of this process; of an instance of one rank they are all (an `Opener`).

    Args:
        cache: where they are; on a CPU it must be shared (`EngineOptions.share_pages`), unless NIXL moves.
        mover: what moves blocks.

    Raises:
        TransferError: nobody else could read them.
    """

    def __init__(self, cache: LatentCache, mover: Mover = "host") -> None:
        self._cache = cache
        self._nixl = NixlPages(cache.pages_LPBW) if mover == "nixl" else None
        self.region = region_of(cache, self._nixl)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The one there is."""
        return (self.region,)

    def open(self, instance_id: str, regions: Sequence[Region]) -> Source:  # noqa: ARG002 (the protocol's)
        """Read rank 0 of the other instance. Raises: TransferError."""
        return self.source(regions[0])

    def close(self, instance_id: str) -> None:
        """The source was all that held them."""

    def source(self, region: Region) -> Source:
        """Read another process's pages. Raises: TransferError as `source_of`."""
        return source_of(region, self._cache, self._nixl)


def region_of(cache: LatentCache, nixl: NixlPages | None) -> Region:
    """How others read this cache.

    Raises:
        TransferError: the pages are this process's alone.
    """
    if nixl is not None:
        return nixl.region()
    if cache.memory is not None:
        return cache.memory.region(cache.num_blocks)
    if cache.pages_LPBW.device.type == "cuda":
        return cuda.region_of(cache.pages_LPBW)
    msg = "the cache is this process's alone. Build the engine with share_pages=True."
    raise TransferError(msg)


def source_of(region: Region, cache: LatentCache, nixl: NixlPages | None) -> Source:
    """Open another process's pages.

    Raises:
        TransferError: this process cannot read pages of that kind.
    """
    if region.kind == "nixl" and nixl is not None:
        return NixlSource(region, nixl)
    device = cache.pages_LPBW.device.type
    if region.kind == "memory" and device == "cpu":
        return MemorySource(region, cache.pages_LPBW)
    if region.kind == "cuda" and device == "cuda":
        return cuda.CudaSource(region, cache.pages_LPBW)
    mine = "nixl" if nixl is not None else {"cpu": "memory", "cuda": "cuda"}[device]
    msg = (
        f"the other instance's blocks move by {region.kind!r}, but this one's by {mine!r}. Start both alike."
    )
    raise TransferError(msg)
