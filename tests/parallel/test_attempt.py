"""Ranks started again by a launcher find each other and nobody who is dead."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist  # noqa: TID251 (stores, without a group)

from benthic.errors import PeerLostError
from benthic.parallel.attempt import agree


def together(store: dist.Store, ranks: int, order: tuple[int, ...]) -> list[str]:
    """What each rank agrees to, when they come in some order."""
    names = [""] * ranks

    def join(rank: int) -> None:
        names[rank] = agree(store, rank, ranks, timeout_s=30.0)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_all_ranks_agree_on_a_name_that_no_start_before_had() -> None:
    store = dist.HashStore()
    starts = [together(store, 4, order) for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1))]
    assert all(len(set(names)) == 1 for names in starts)
    assert len({names[0] for names in starts}) == 3


def test_ranks_that_died_while_joining_are_not_taken_for_the_living() -> None:
    """Of the start before, ranks 1 and 2 said hello and were killed; rank 0 had answered one of them."""
    store = dist.HashStore()
    store.set("hello/1", "dead1")
    store.set("hello/2", "dead2")
    store.set("answer/dead1", "an attempt that is over")
    store.set("confirm/an attempt that is over/1", "")
    names = together(store, 3, (0, 1, 2))
    assert len(set(names)) == 1
    assert names[0] != "an attempt that is over"


def test_rank_that_never_comes_is_named() -> None:
    now = iter(range(1000))
    with pytest.raises(PeerLostError, match=r"ranks \[1, 2\] did not join"):
        agree(dist.HashStore(), 0, 3, timeout_s=5.0, clock=lambda: float(next(now)))
