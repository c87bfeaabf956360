"""A rank other than 0 in a pull: it copies the blocks that rank 0 names, and says when it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benthic.errors import TransferError
from benthic.serve.commands import Fetched, encode

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from benthic.serve.commands import ClosePages, Fetch, OpenPages
    from benthic.serve.pages import Pages
    from benthic.serve.transfer.memory import Copy, Source

LOOK_S: Final = 0.0005
"""Seconds between two looks at copies while rank 0 says nothing."""


class Fetching:
    """The copies of one rank.

    Args:
        rank: this one.
        pages: of this rank.
        pipe: to rank 0.
    """

    def __init__(self, rank: int, pages: Pages, pipe: Connection) -> None:
        self._rank = rank
        self._pages = pages
        self._pipe = pipe
        self._sources: dict[str, Source | str] = {}  # or why there is none
        self._copies: list[tuple[int, Copy, Source]] = []

    def receive(self) -> bytes:
        """Rank 0's next command; copies that end before it comes are reported.

        Raises:
            EOFError: rank 0 is gone.
        """
        while self._look() and not self._pipe.poll(LOOK_S):
            pass
        return self._pipe.recv_bytes()

    def open(self, command: OpenPages) -> None:
        """Map the pages of one rank of another instance."""
        region = command.regions[self._rank % len(command.regions)]
        try:
            self._sources[command.instance_id] = self._pages.source(region)
        except TransferError as error:
            self._sources[command.instance_id] = str(error)

    def close(self, command: ClosePages) -> None:
        """Let them go; a copy that is under way keeps what it needs."""
        self._sources.pop(command.instance_id, None)

    def start(self, command: Fetch) -> None:
        """Begin a copy; its end, good or bad, is told once this rank writes nothing more for it."""
        source = self._sources.get(command.instance_id, f"instance {command.instance_id} is not open here")
        if isinstance(source, str):
            self._tell(command.number, source)
            return
        try:
            copy = source.start(command.remote_blocks, command.local_blocks)
        except TransferError as error:
            self._tell(command.number, str(error))
        else:
            self._copies.append((command.number, copy, source))

    def _look(self) -> bool:
        """Report copies that have ended; whether others have not."""
        self._copies = [each for each in self._copies if not self._over(*each[:2])]
        return bool(self._copies)

    def _over(self, number: int, copy: Copy) -> bool:
        trouble = None
        try:
            if not copy.ended():
                return False
        except TransferError as error:
            copy.wait()
            trouble = str(error)
        self._tell(number, trouble)
        return True

    def _tell(self, number: int, trouble: str | None) -> None:
        self._pipe.send_bytes(encode(Fetched(number, trouble)))
