"""The processes of an engine's other ranks: they are told the same, and the one to blame is named."""

from __future__ import annotations

import os
import queue
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import TYPE_CHECKING

import fake_ranks
import pytest
from processes import gone

from benthic.errors import PeerLostError
from benthic.sched.plans import BlockCopy, Prefill, TableWrite
from benthic.serve import followers as module
from benthic.serve.commands import Here, Leave, Move, Remember, Score, Step, decode_command, encode
from benthic.serve.followers import Followers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.dist


@contextmanager
def ranks(body: Callable, size: int = 3) -> Iterator[Followers]:
    followers = Followers(body, size)
    try:
        yield followers
    finally:
        followers.dismiss()
        followers.end()
        assert all(gone(pid) for pid in followers.pids)


def test_every_rank_hears_every_command() -> None:
    with ranks(fake_ranks.obedient) as followers:
        followers.meet("started")
        followers.tell(Score(0, 4))
        answers = [link.pipe.recv_bytes() for link in followers._links]
        assert answers == [encode(Here("rank 1 heard")), encode(Here("rank 2 heard"))]


def test_commands_come_out_as_they_went_in() -> None:
    prefills = (Prefill("a", 2, 0, 3, (5, 6, 7), samples=True, ahead=(8,)),)
    step = Step(5, (0, 1), (9, 4), (1, 0), prefills, (TableWrite(0, 1, (3, 4)),), (1, 0))
    move = Move((BlockCopy(3, 0),), (BlockCopy(4, 1), BlockCopy(5, 2)))
    for command in (step, move, Score(1, 2), Remember((0, 2)), Leave()):
        assert decode_command(encode(command)) == command
    plan = step.plan(step.slots)
    assert (plan.decode_slots, plan.decode_positions, plan.decode_drafts) == ((0, 1), (9, 4), (1, 0))
    assert (plan.prefills, plan.tables, len(plan.sampled_ids)) == (prefills, step.tables, 3)
    assert Step.of(plan, None).prefills == prefills


def test_a_rank_that_fails_while_starting_is_named_and_not_those_that_lost_it() -> None:
    with ranks(fake_ranks.second_fails) as followers:
        with pytest.raises(PeerLostError, match=r"rank 2 .* failed: OutOfMemoryError: 7 GiB") as caught:
            followers.meet("started")
        assert "3 ranks" in str(caught.value)
        assert "peer closed" not in str(caught.value)


def test_a_rank_that_is_killed_is_named_by_whoever_misses_it() -> None:
    with ranks(fake_ranks.second_is_killed) as followers:
        followers.meet("started")
        followers.tell(Score(0, 1))
        with pytest.raises(PeerLostError, match=r"rank 2 \(pid \d+\) was killed by signal 9"):
            followers.meet("loaded")


def test_a_rank_that_is_killed_is_noticed_while_rank_0_waits_for_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.0)
    heard: queue.Queue[str] = queue.Queue()
    with ranks(fake_ranks.second_is_killed) as followers:
        followers.meet("started")
        followers.watch(heard.put)
        followers.tell(Score(0, 1))
        assert "rank 2" in heard.get(timeout=60)


def test_ranks_that_leave_are_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.2)
    heard: queue.Queue[str] = queue.Queue()
    with ranks(fake_ranks.obedient) as followers:
        followers.meet("started")
        followers.watch(heard.put)
    with pytest.raises(queue.Empty):
        heard.get(timeout=0.5)


def test_a_rank_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVE_S", 0.1)
    with ranks(fake_ranks.stubborn, size=2) as followers:
        followers.meet("started")


def test_what_fails_on_rank_0_itself_is_said_too() -> None:
    with ranks(fake_ranks.obedient, size=2) as followers:
        followers.meet("started")
        assert "rank 0 failed: ValueError: a bad chip" in str(followers.lost(ValueError("a bad chip")))


class Ending:
    """A process that ends between two looks at it."""

    pid, exitcodes = 7, [None]

    def __init__(self) -> None:
        self.sentinel, writing = os.pipe()
        os.close(writing)

    @property
    def exitcode(self) -> int | None:
        return self.exitcodes.pop() if self.exitcodes else -9

    def join(self, _seconds: float | None = None) -> None:
        """It has."""

    def kill(self) -> None:
        """It needs no more."""


def test_a_rank_that_ends_while_it_is_looked_for_is_found() -> None:
    with ranks(fake_ranks.obedient, size=1) as followers:
        here, there = Pipe()
        followers._links.append(module.Link(1, Ending(), here))
        lost = followers.lost(RuntimeError("Connection reset by peer"))
        assert "rank 1 (pid 7) was killed by signal 9" in str(lost)
        followers._links.clear()
        assert not there.poll(0)
