"""When one rank fails or hangs, every rank ends and says which one and where."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from benthic.errors import CheckpointError, NumericsError, PeerLostError, PipelineError
from benthic.parallel.watchdog import STUCK, Watchdog
from benthic.train.failures import Failures

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def refused() -> RuntimeError:
    return RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


def test_rank_that_fails_leaves_its_reason_and_the_others_repeat_it(tmp_path: Path) -> None:
    blamed = Failures(tmp_path, 1, 4).explain(NumericsError("loss is nan"), 7)
    assert isinstance(blamed, NumericsError)
    assert str(blamed) == "rank 1 of 4, step 7: loss is nan"
    other = Failures(tmp_path, 0, 4).explain(refused(), 7)
    assert isinstance(other, PeerLostError)
    assert "rank 0 of 4, step 7: lost another rank" in str(other)
    assert "The first to fail was rank 1 of 4, step 7: loss is nan" in str(other)
    Failures(tmp_path, 1, 4).forget()
    assert list(tmp_path.iterdir()) == []


def test_rank_that_was_killed_left_no_reason_and_that_is_said(tmp_path: Path) -> None:
    pauses: list[float] = []
    found = Failures(tmp_path, 0, 2, pause=pauses.append).explain(refused(), 3)
    assert "No rank left a reason" in str(found)
    assert 2.5 < sum(pauses) < 3.5


def test_broken_connection_below_a_slot_is_a_lost_peer(tmp_path: Path) -> None:
    error = PipelineError("pipeline rank 0 failed in slot 0F1")
    error.__cause__ = refused()
    found = Failures(tmp_path, 0, 2, pause=lambda _: None).explain(error, 1)
    assert isinstance(found, PeerLostError)
    assert "failed in slot 0F1" in str(found)


def test_one_process_raises_what_it_raised(tmp_path: Path) -> None:
    error = CheckpointError("disk full")
    assert Failures(tmp_path, 0, 1).explain(error, 2) is error
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass
class Hands:
    """A clock that a test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def wait_for(ready: object) -> None:
    deadline = time.monotonic() + 60
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_watchdog_barks_once_something_takes_longer_than_it_may(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hands, ends = Hands(), []
    report = tmp_path / "logs" / "stuck-rank-3.txt"
    dog = Watchdog(0.2, report, lambda: "rank 3: waits for 1F0", clock=hands, end=ends.append)
    with dog:
        dog.begin("step 5")
        hands.now = 0.1
        dog.begin("step 6")
        hands.now = 0.25  # more than the limit since step 5, but not since step 6
        time.sleep(5 * dog.interval_s)
        assert not report.exists()
        hands.now = 0.5
        wait_for(lambda: ends)
    text = report.read_text()
    assert ends == [STUCK]
    assert text.startswith("step 6 has taken 0.4 s; train.stuck_s=0.2.\nrank 3: waits for 1F0\n")
    assert "test_watchdog_barks_once" in text  # the stack of the thread that hangs
    assert "flight recorder" in text
    said = f"error: step 6 has taken 0.4 s; train.stuck_s=0.2. Where this rank stands: {report}.\n"
    assert capsys.readouterr().err == said


def test_watchdog_that_is_off_or_at_rest_has_nothing_to_say(tmp_path: Path) -> None:
    hands = Hands()
    with Watchdog(0.0, tmp_path / "a", str, clock=hands) as off:
        off.begin("step 1")
        assert off._thread is None
    with Watchdog(0.1, tmp_path / "b", str, clock=hands) as resting:
        resting.begin("step 1")
        resting.rest()
        hands.now = 9.0
        time.sleep(5 * resting.interval_s)
    assert list(tmp_path.iterdir()) == []
