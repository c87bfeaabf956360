"""Ranks that were started together finding each other, among what ranks before them have left in the store.

torchrun keeps one store for all its restarts: a rank that is started again may read there the address of a
dead one, and its connection is refused. How often its agent restarted differs from host to host, so that
count is no name for an attempt. Therefore rank 0 makes one up and tells each rank that is alive.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Final

from benthic.errors import PeerLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist

_LOOK_S: Final = 0.01


def agree(
    store: dist.Store, rank: int, ranks: int, *, timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> str:
    """A name for this start of all ranks, equal on all of them and never used before.

    Every rank says hello under a name of its own and waits for the answer to that name, which nobody dead can
    have got; rank 0 answers whoever says hello until everyone has confirmed this answer.

    Raises:
        PeerLostError: some ranks have not come within `timeout_s`.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        _answer(store, mine, set(range(1, ranks)), clock() + timeout_s, clock)
        return mine
    store.set(f"hello/{rank}", mine)
    first = store.get(f"answer/{mine}").decode()
    store.set(f"confirm/{first}/{rank}", "")
    return first


def _answer(
    store: dist.Store, name: str, missing: set[int], deadline: float, clock: Callable[[], float]
) -> None:
    while missing:
        for rank in sorted(missing):
            if store.check([f"confirm/{name}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", name)
        if missing and clock() > deadline:
            message = f"ranks {sorted(missing)} did not join in time. See their logs, then start all again."
            raise PeerLostError(message)
        time.sleep(_LOOK_S if missing else 0.0)
