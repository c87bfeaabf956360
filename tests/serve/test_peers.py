"""Ranks that take turns meet, hear each other, wake each other, and name the one that ended."""

from __future__ import annotations

import re
import select
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benthic.errors import PeerLostError
from benthic.sched.lockstep import Intent
from benthic.serve import peers as peers_module
from benthic.serve.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    """Ranks of one process, each met by a thread."""
    with tempfile.TemporaryDirectory(prefix="benthic-") as folder, ThreadPoolExecutor(3) as threads:
        met = list(threads.map(lambda rank: Peers.meet(Path(folder), rank, 3), range(3)))
        yield met
        for peers in met:
            peers.part()


def together(ranks: list[Peers], intents: list[Intent]) -> list[list[Intent]]:
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda pair: pair[0].exchange(pair[1]), zip(ranks, intents, strict=True)))


def test_all_ranks_hear_the_same_in_the_order_of_ranks(three: list[Peers]) -> None:
    for turn in range(3):
        intents = [Intent(rows=10 * turn + rank, working=bool(rank)) for rank in range(3)]
        assert together(three, intents) == [intents] * 3


def test_a_word_wakes_a_rank_until_it_has_answered(three: list[Peers]) -> None:
    woken = select.poll()
    woken.register(three[2].wake_fd, select.POLLIN)
    assert not woken.poll(0)
    with ThreadPoolExecutor(1) as thread:
        heard = thread.submit(three[0].exchange, Intent(rows=1))
        assert woken.poll(10_000)
        together(three[1:], [Intent(), Intent()])
        assert heard.result()[0] == Intent(rows=1)
    assert not woken.poll(0)


def test_a_rank_that_ends_without_a_word_is_named_by_all(three: list[Peers]) -> None:
    three[2].part()
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(peers.exchange, Intent()) for peers in three[:2]]
    for end in ends:
        with pytest.raises(PeerLostError, match=r"the 3 ranks .* rank 2 \(pid \d+\) has ended\. Start"):
            end.result()


def test_a_rank_that_fails_says_why_and_those_that_lose_it_do_not_take_the_blame(three: list[Peers]) -> None:
    said = three[1].lost(MemoryError("7 GiB"))
    assert "rank 1 failed: MemoryError: 7 GiB" in str(said)
    found = three[0].lost(RuntimeError("Connection closed by peer"))
    for error in (found, three[2].lost(None)):
        assert re.search(r"cannot go on: rank 1 \(pid \d+\) failed: MemoryError: 7 GiB\.", str(error))


def test_a_rank_that_waits_on_a_device_is_ended_by_its_watch(
    three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "GRACE_S", 0.05)
    said: list[str] = []
    told = threading.Event()
    three[0].watch(lambda words: (said.append(words), told.set()))
    three[1].part()
    assert told.wait(10)
    assert "rank 1 (pid" in said[0]


def test_a_rank_that_leaves_with_the_others_is_not_missed(
    three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "GRACE_S", 0.2)
    said: list[str] = []
    three[0].watch(said.append)
    for peers in three[::-1]:
        peers.part()
    assert not any(t.name == "peers" and (t.join(5), t.is_alive())[1] for t in threading.enumerate())
    assert said == []


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerLostError, match="rank 1 has waited in vain for rank 0"):
        Peers.meet(tmp_path, 1, 2, patience_s=0.05)
    with pytest.raises(PeerLostError, match="rank 0 has waited in vain for rank 1"):
        Peers.meet(tmp_path, 0, 2, patience_s=0.05)
