"""Pages on another host: NIXL reads them over RDMA, or over TCP where there is none.

NIXL is optional (`pip install nixl`). Its agent of the owner registers the pages; the reader's agent issues
one read of all the pieces of a transfer, a piece being one block of one layer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from benthic.errors import TransferError
from benthic.serve.transfer.handshake import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

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

    @property
    def memory(self) -> str:
        """NIXL's name for where the pages are."""
        return "VRAM" if self.pages_LPBW.device.type == "cuda" else "DRAM"

    @property
    def device_id(self) -> int:
        """The GPU's index; 0 on a CPU."""
        return self.pages_LPBW.device.index or 0

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
    """Reads the pages of an instance on another host."""

    def __init__(self, region: Region, mine: NixlPages) -> None:
        self._mine = mine
        self._handle = msgspec.msgpack.decode(region.handle, type=Handle)
        self._num_blocks = region.num_blocks
        with refused("the other instance's agent"):
            self._peer = mine.agent.add_remote_agent(self._handle.metadata)

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> Read:
        """Copy blocks, all layers of them; nothing waits.

        Raises:
            TransferError: NIXL refuses the read.
        """
        mine, agent = self._mine, self._mine.agent
        near = self._pieces(
            mine.pages_LPBW.data_ptr(), mine.pages_LPBW.shape[1], local_blocks, mine.device_id
        )
        far = self._pieces(self._handle.address, self._num_blocks, remote_blocks, self._handle.device_id)
        with refused(f"a read of {len(near)} pieces"):
            transfer = agent.initialize_xfer(
                "READ",
                agent.get_xfer_descs(near, mem_type=mine.memory),
                agent.get_xfer_descs(far, mem_type=self._handle.memory),
                self._peer,
                b"",
            )
        return Read(agent, transfer)

    def _pieces(
        self, address: int, num_blocks: int, blocks: Iterable[int], device_id: int
    ) -> list[tuple[int, int, int]]:
        layers, _, block_size, width = self._mine.pages_LPBW.shape
        size = block_size * width * self._mine.pages_LPBW.element_size()
        rows = [(layer * num_blocks + block) for block in blocks for layer in range(layers)]
        return [(address + row * size, size, device_id) for row in rows]


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
