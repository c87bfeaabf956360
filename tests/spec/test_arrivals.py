from __future__ import annotations

import itertools
import math
import statistics

import pytest

from benthic.errors import ConfigError
from benthic.spec.arrivals import arrival_times


def gaps(times: tuple[float, ...]) -> list[float]:
    return [b - a for a, b in itertools.pairwise((0.0, *times))]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_variance_of_the_gamma(burstiness: float) -> None:
    found = gaps(arrival_times(20_000, rate=8.0, burstiness=burstiness, seed=3))
    assert statistics.mean(found) == pytest.approx(1 / 8)
    squared_variation = statistics.pvariance(found) / statistics.mean(found) ** 2
    assert squared_variation == pytest.approx(1 / burstiness, rel=0.1)


def test_two_rates_of_one_seed_differ_in_speed_alone() -> None:
    slow, fast = (arrival_times(50, rate=rate, burstiness=0.5, seed=1) for rate in (2.0, 6.0))
    assert fast == pytest.approx([at / 3 for at in slow])
    assert arrival_times(50, rate=2.0, burstiness=0.5, seed=2) != slow


def test_a_short_run_has_exactly_the_rate_that_was_asked() -> None:
    assert arrival_times(7, rate=3.5, seed=9)[-1] == pytest.approx(2.0)


def test_an_infinite_rate_puts_everything_at_zero() -> None:
    assert arrival_times(3, rate=math.inf) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": math.nan}, {"rate": 1.0, "burstiness": 0.0}])
def test_a_rate_or_burstiness_that_is_not_above_zero_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        arrival_times(3, **wrong)
