"""A rank that is slow time and again is told of; one that was slow once is not."""

from __future__ import annotations

import pytest

from benthic.train.stragglers import Slowest, Stragglers


def test_rank_slow_in_three_reports_is_told_of_once_until_three_more() -> None:
    watch = Stragglers()
    told = [watch.add((1.0, 1.1, 1.5, 1.0))[1] for _ in range(7)]
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0, 1, 0]
    assert told[2][0].startswith("rank 2 takes 43% longer for attention than the median rank, in 3 reports")


def test_rank_that_recovers_is_forgiven() -> None:
    watch = Stragglers()
    reports = [(1.0, 1.0, 1.5), (1.0, 1.0, 1.5), (1.0, 1.0, 1.0), (1.0, 1.0, 1.5), (1.0, 1.0, 1.5)]
    assert not any(watch.add(report)[1] for report in reports)


@pytest.mark.parametrize(
    ("seconds", "rank", "ratio"), [((1.0, 3.0, 2.0), 1, 1.5), ((0.0, 0.0), 0, 1.0), ((2.0, 2.0), 0, 1.0)]
)
def test_slowest_rank_is_named_with_its_share_of_the_median(
    seconds: tuple[float, ...], rank: int, ratio: float
) -> None:
    assert Stragglers().add(seconds)[0] == Slowest(rank, pytest.approx(ratio))
