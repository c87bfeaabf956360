"""Blocks that stay after their request has ended, because another instance is going to read them.

A prefill instance computes a prompt for somebody else. When such a request ends, its blocks go under a lease:
they are handed on when the reader says so, or when the lease is over. Prefill memory is thereby the buffer
between the two sides (DistServe section 4.3: "pull"), and `lease_share` bounds it. What is computed of a
longer prompt is lent before that, for as long as the request keeps its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from benthic.errors import OverloadedError

if TYPE_CHECKING:
    from benthic.sched.blocks import BlockPool
    from benthic.sched.plans import BatchingConfig
    from benthic.sched.request import Request, SequenceState


Journal = Callable[[dict[str, object]], object]
"""Takes note of a call from outside that changed something; see `benthic.sched.replay`."""


def ignore(event: dict[str, object]) -> None:
    """The journal of a scheduler that is not recorded."""


class Lease(NamedTuple):
    """What one reader may read.

    Attributes:
        lease_id: the request that computed it.
        blocks: in the order of positions.
        num_tokens: positions 0 to `num_tokens - 1` are valid.
        deadline: `now` from which the owner may hand the blocks on; inf while the prompt is being computed.
    """

    lease_id: str
    blocks: tuple[int, ...]
    num_tokens: int
    deadline: float


class Leases:
    """Leased blocks of one instance: granted when a held request ends, until released.

    Time only passes by arguments: `due` names what is over, and the caller releases it once no reader can
    believe in it any more.
    """

    def __init__(self, config: BatchingConfig, pool: BlockPool) -> None:
        self._pool = pool
        self._seconds = config.lease_seconds
        self._block_size = config.block_size
        self._most = int(config.lease_share * config.num_blocks)
        self._leases: dict[str, Lease] = {}
        self._promised: dict[str, int] = {}
        self.lent: dict[str, Lease] = {}
        self.journal: Journal = ignore

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_blocks(self) -> int:
        """Blocks under lease; one that two leases share counts twice."""
        return sum([len(lease.blocks) for lease in self._leases.values()])

    @property
    def tables(self) -> list[list[int]]:
        """The blocks of every lease (for checking that blocks are conserved)."""
        return [list(lease.blocks) for lease in self._leases.values()]

    def get(self, lease_id: str) -> Lease | None:
        """The lease of that name, if it is not released."""
        return self._leases.get(lease_id)

    def promise(self, request: Request) -> None:
        """Set blocks aside in the account for a request that will be held.

        Raises:
            OverloadedError: leased and promised blocks would exceed `lease_share`. One alone always may.
        """
        if not request.hold:
            return
        need = -(-request.prompt_len // self._block_size)
        taken = self.num_blocks + sum(self._promised.values())
        if taken and taken + need > self._most:
            msg = (
                f"request {request.request_id!r} needs {need} blocks to be held, but {taken} of the "
                f"{self._most} that lease_share allows are leased or promised. Retry when readers have read."
            )
            raise OverloadedError(msg)
        self._promised[request.request_id] = need

    def lend(self, seq: SequenceState, num_tokens: int) -> None:
        """Let the first `num_tokens` positions of a held prompt be read, of which more are to be computed.

        `lent` then has it until the request ends or loses its blocks, with the columns of the whole prompt;
        only full ones will not be written any more. What was preempted is not lent again: its blocks are
        others then.
        """
        request = seq.request
        if request.hold and not seq.preemptions:
            self.lent[request.request_id] = Lease(request.request_id, tuple(seq.table), num_tokens, math.inf)

    def take_back(self, request_id: str) -> None:
        """A request loses its blocks; one that lends nothing is ignored."""
        self.lent.pop(request_id, None)

    def grant(self, seq: SequenceState, now: float, *, keep: bool) -> None:
        """Take a promise back at the end of `seq`; when `keep`, lease the blocks of its computed positions.

        They gain a user, so that the end of the sequence cannot free them.
        """
        request_id = seq.request.request_id
        self._promised.pop(request_id, None)
        self.take_back(request_id)
        if not (keep and seq.request.hold):
            return
        num_tokens = seq.num_tokens - 1
        blocks = tuple(seq.table[: -(-num_tokens // self._block_size)])
        for block in blocks:
            self._pool.share(block)
        self._leases[request_id] = Lease(request_id, blocks, num_tokens, now + self._seconds)

    def renew(self, lease_id: str, now: float) -> bool:
        """Let a lease last `lease_seconds` from `now`; False when there is none of that name."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        self._leases[lease_id] = lease._replace(deadline=max(lease.deadline, now + self._seconds))
        self.journal({"renew": lease_id, "now": now})
        return True

    def due(self, now: float) -> tuple[str, ...]:
        """Leases that are over, oldest grant first."""
        return tuple([lease.lease_id for lease in self._leases.values() if lease.deadline <= now])

    def release(self, lease_id: str) -> bool:
        """Hand the blocks of a lease on; False when there is none of that name (a second release)."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self._pool.give_back(list(lease.blocks))
        self.journal({"release": lease_id})
        return True
