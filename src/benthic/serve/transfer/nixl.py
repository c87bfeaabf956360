"""Pages on another host: NIXL reads them over RDMA, or over TCP where there is none.

NIXL is optional (`pip install nixl`). Its agent of the owner registers the pages. A reader describes all
pieces of both sides once, a piece being one block of one layer; a transfer is one read of some by number.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from benthic.errors import TransferError
from benthic.serve.transfer.handshake import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""A read that takes longer has lost its other side."""

LOOK_S = 0.0002
"""Seconds between two looks at a read that is waited for."""


class Handle(msgspec.Struct, frozen=True):
    """An owner's agent and its pages."""

    metadata: bytes
    address: int
    device_id: int
    memory: str


class NixlPages:
    """An agent that has registered this instance's pages, as their owner and as the reader of others'.

    Raises:
        TransferError: NIXL is not installed, or refuses to register the pages.
    """

    def __init__(self, pages_LPBW: Tensor) -> None:
        api = _nixl()
        self.pages_LPBW = pages_LPBW
        with refused(f"to register {pages_LPBW.nbytes:,} bytes of pages on {pages_LPBW.device}"):
            config = api.nixl_agent_config(backends=["UCX"])
            self.agent = api.nixl_agent(f"benthic-{uuid.uuid4().hex}", config)
            self.agent.register_memory(pages_LPBW.flatten(1))
            own = self.pieces(pages_LPBW.data_ptr(), pages_LPBW.shape[1], self.device_id)
            self.described = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", own, mem_type=self.memory)

    @property
    def memory(self) -> str:
        """NIXL's name for where the pages are."""
        return "VRAM" if self.pages_LPBW.device.type == "cuda" else "DRAM"

    @property
    def device_id(self) -> int:
        """The GPU's index; 0 on a CPU."""
        return self.pages_LPBW.device.index or 0

    def pieces(self, address: int, num_blocks: int, device_id: int) -> np.ndarray[Any, Any]:
        """Address, bytes and device of every piece of pages like these, uint64 [layers * blocks, 3]."""
        layers, _, block_size, width = self.pages_LPBW.shape
        size = block_size * width * self.pages_LPBW.element_size()
        found = np.empty((layers * num_blocks, 3), dtype=np.uint64)
        found[:, 0] = address + size * np.arange(layers * num_blocks, dtype=np.uint64)
        found[:, 1:] = size, device_id
        return found

    def region(self) -> Region:
        """What a reader needs."""
        handle = Handle(
            self.agent.get_agent_metadata(), self.pages_LPBW.data_ptr(), self.device_id, self.memory
        )
        encoded = msgspec.msgpack.encode(handle)
        return Region(kind="nixl", num_blocks=self.pages_LPBW.shape[1], handle=encoded)


class Read:
    """One read, from its start.

    Raises:
        TransferError: NIXL refuses it.
    """

    def __init__(self, agent: Any, transfer: Any) -> None:
        self._agent = agent
        self._transfer = transfer
        self._until = time.monotonic() + PATIENCE_S
        self._state = self._asked(agent.transfer)
        self._look()

    def ended(self) -> bool:
        """Whether the blocks are there. Raises: TransferError on an error, or after `PATIENCE_S`."""
        if self._state == "PROC":
            self._state = self._asked(self._agent.check_xfer_state)
            self._look()
        return bool(self._state == "DONE")

    def wait(self) -> None:
        """Until NIXL says that it is over, or `PATIENCE_S` are."""
        with contextlib.suppress(TransferError):
            while self._transfer is not None and not self.ended():
                time.sleep(LOOK_S)

    def _asked(self, question: Callable[[Any], str]) -> str:
        """The state that NIXL answers; a read that it gives up is one that failed."""
        try:
            return question(self._transfer)
        except Exception:  # NIXL's errors have no other base
            logger.exception("NIXL gave a read up")
            return "ERR"

    def _look(self) -> None:
        """Give NIXL's handle back when the read is over, and raise when it failed."""
        late = self._state == "PROC" and time.monotonic() > self._until
        if self._state == "PROC" and not late:
            return
        if self._transfer is not None:
            transfer, self._transfer = self._transfer, None
            with contextlib.suppress(TransferError), refused("to let a read go"):
                self._agent.release_xfer_handle(transfer)  # aborts a read that is still going on
        if self._state != "DONE":
            state, self._state = self._state, "ERR"
            msg = f"NIXL's read ended as {state!r} (waited at most {PATIENCE_S:.0f} s)."
            raise TransferError(msg)


class NixlSource:
    """Reads the pages of an instance on another host.

    Raises:
        TransferError: NIXL refuses the other agent or its pages.
    """

    def __init__(self, region: Region, mine: NixlPages) -> None:
        self._mine = mine
        self._num_blocks = region.num_blocks
        handle = msgspec.msgpack.decode(region.handle, type=Handle)
        with refused("the other instance's agent"):
            peer = mine.agent.add_remote_agent(handle.metadata)
            theirs = mine.pieces(handle.address, region.num_blocks, handle.device_id)
            self._described = mine.agent.prep_xfer_dlist(peer, theirs, mem_type=handle.memory)

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> Read:
        """Copy blocks, all layers of them; nothing waits.

        Raises:
            TransferError: NIXL refuses the read.
        """
        mine, agent = self._mine, self._mine.agent
        near = self._numbers(local_blocks, mine.pages_LPBW.shape[1])
        far = self._numbers(remote_blocks, self._num_blocks)
        with refused(f"a read of {near.size} pieces"):
            transfer = agent.make_prepped_xfer("READ", mine.described, near, self._described, far)
        return Read(agent, transfer)

    def _numbers(self, blocks: Sequence[int], num_blocks: int) -> np.ndarray[Any, Any]:
        layers = np.arange(self._mine.pages_LPBW.shape[0])[:, None]
        return (layers * num_blocks + np.asarray(blocks)).ravel().astype(np.int32)


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn whatever NIXL raises into a TransferError: its errors have no base of their own."""
    try:
        yield
    except Exception as error:
        msg = f"NIXL refused {what}: {error!r}."
        raise TransferError(msg) from error


def _nixl() -> Any:
    try:
        return importlib.import_module("nixl._api")
    except ImportError as error:
        msg = f"transfers between hosts need NIXL, which is not installed ({error}). Install nixl."
        raise TransferError(msg) from error
