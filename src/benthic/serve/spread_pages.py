"""Pulls into an instance of several ranks: each rank copies the same blocks for itself, rank 0 says which.

Latent attention has one cache entry for all heads, so every rank of either side holds the same blocks. Rank r
reads rank r mod P of P ranks on the other side, which spreads the load over their links. Blocks have arrived
when all ranks have them; until all have let go, none of them may be given to anybody else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benthic.errors import TransferError
from benthic.serve.commands import ClosePages, Fetch, Fetched, OpenPages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.serve.followers import Followers
    from benthic.serve.pages import Pages
    from benthic.serve.transfer.handshake import Region
    from benthic.serve.transfer.memory import Copy, Source


class SpreadPages:
    """The pages of an instance's ranks, seen from rank 0 (a `benthic.serve.transfer.memory.Opener`).

    Args:
        own: rank 0's.
        followers: the other ranks, which have built their engines and said where their pages are.
    """

    def __init__(self, own: Pages, followers: Followers) -> None:
        self.regions = (own.region, *followers.regions())
        self._own = own
        self._followers = followers
        self._answers = Answers(followers)

    def open(self, instance_id: str, regions: Sequence[Region]) -> SpreadSource:
        """Let every rank map one rank of the other instance. Raises: TransferError when rank 0 cannot.

        What another rank cannot do, its fetches say.
        """
        own = self._own.source(regions[0])
        self._followers.tell(OpenPages(instance_id, tuple(regions)))
        return SpreadSource(instance_id, own, self._answers)

    def close(self, instance_id: str) -> None:
        """Let every rank let go of it."""
        self._followers.tell(ClosePages(instance_id))


class Answers:
    """What the other ranks were told to fetch, and have not answered."""

    def __init__(self, followers: Followers) -> None:
        self._followers = followers
        self._due: dict[int, SpreadCopy] = {}
        self._told = 0

    def tell(self, instance_id: str, remote: Sequence[int], local: Sequence[int], own: Copy) -> SpreadCopy:
        """Let the others copy what rank 0 has begun to copy."""
        self._told += 1
        self._followers.tell(Fetch(self._told, instance_id, tuple(remote), tuple(local)))
        copy = self._due[self._told] = SpreadCopy(own, self, self._followers.size - 1)
        return copy

    def hear(self, *, wait: bool) -> None:
        """Take what they have said; with `wait`, wait for a word.

        Raises:
            PeerLostError: one is gone, and what it was writing to with it.
        """
        for rank, answer in self._followers.heard(wait=wait):
            assert isinstance(answer, Fetched)  # noqa: S101 (all that a running rank says)
            copy = self._due[answer.number]
            copy.missing -= 1
            if answer.trouble is not None:
                copy.troubles.append(f"rank {rank}: {answer.trouble}")
            if not copy.missing:
                del self._due[answer.number]


@dataclass(frozen=True)
class SpreadSource:
    """Another instance's pages, open on every rank of this one."""

    instance_id: str
    own: Source
    answers: Answers

    def start(self, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> SpreadCopy:
        """Copy blocks into every rank's cache; nothing waits.

        Raises:
            TransferError: rank 0 cannot, and so no rank has begun.
        """
        own = self.own.start(remote_blocks, local_blocks)
        return self.answers.tell(self.instance_id, remote_blocks, local_blocks, own)


@dataclass(eq=False)
class SpreadCopy:
    """One copy of each rank; `missing` counts the ranks other than 0 that still write, or may."""

    own: Copy
    answers: Answers
    missing: int
    troubles: list[str] = field(default_factory=list)

    def ended(self) -> bool:
        """Whether all ranks have the blocks. Raises: TransferError when one of them will not."""
        self.answers.hear(wait=False)
        if self.troubles:
            raise TransferError("; ".join(self.troubles))
        return self.own.ended() and not self.missing

    def wait(self) -> None:
        """Until no rank writes any more, whether it has the blocks or not."""
        self.own.wait()
        while self.missing:
            self.answers.hear(wait=True)
