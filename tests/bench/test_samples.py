from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import sample

from benthic.bench.samples import Lag, Spread, measure
from benthic.spec.objectives import Objectives

CALM = Lag(send_p50=0.0, send_p99=0.0, send_max=0.0, loop_p99=0.0, loop_max=0.0, cpu=0.1)
QS = (50.0, 90.0, 99.0)


def test_the_four_latencies_follow_their_definitions() -> None:
    each = sample((1.5, 1), (1.7, 2), (2.0, 1), due=1.0, sent=1.2)
    assert each.latencies.ttft_s == pytest.approx(0.5)
    assert each.latencies.tpot_s == pytest.approx(0.5 / 3)
    assert each.latencies.e2e_s == pytest.approx(1.0)
    assert each.token_gaps == pytest.approx([0.1, 0.1, 0.3])
    assert each.send_lag_s == pytest.approx(0.2)


def test_a_single_token_has_no_time_per_output_token() -> None:
    assert sample((1.0, 1)).latencies.tpot_s is None


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    spread = Spread.of(values, (q,))
    assert spread.percentiles[q] == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-9)
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.std == pytest.approx(np.std(values), abs=1e-6)


def test_attainment_is_joint_and_a_failure_is_a_miss() -> None:
    samples = [
        sample((0.1, 1), (0.2, 1)),  # both met
        sample((0.1, 1), (0.9, 1)),  # tpot missed
        sample((0.9, 1), (0.95, 1)),  # ttft missed
        sample(error="HTTP 503: full"),
    ]
    found = measure(samples, Objectives(ttft_s=0.5, tpot_s=0.5), percentiles=QS, lag=CALM)
    assert (found.completed, found.failed, found.errors) == (3, 1, {"HTTP 503: full": 1})
    assert found.attainment == pytest.approx(0.25)
    assert found.goodput == pytest.approx(1 / 0.95)
    separate = [
        measure(samples, bound, percentiles=QS, lag=CALM).attainment
        for bound in (Objectives(ttft_s=0.5), Objectives(tpot_s=0.5))
    ]
    assert separate == [0.5, 0.5]


def test_rates_run_from_the_first_request_due_to_the_last_answer_complete() -> None:
    samples = [sample((3.0, 4), due=1.0), sample((5.0, 6), due=2.0)]
    found = measure(samples, None, percentiles=QS, lag=CALM)
    assert found.duration_s == pytest.approx(4.0)
    assert found.request_rate == pytest.approx(0.5)
    assert found.output_rate == pytest.approx(2.5)
    assert found.input_tokens == 10
    assert found.attainment is None


def test_a_run_of_failures_has_no_latencies_but_a_count() -> None:
    found = measure([sample(error="x", due=1.0), sample(error="x")], None, percentiles=QS, lag=CALM)
    assert (found.completed, found.failed) == (0, 2)
    assert np.isnan(found.spreads["ttft"].mean)


def test_a_late_client_is_named_with_both_numbers() -> None:
    samples = [sample((2.0, 1), due=0.0, sent=0.05)]
    assert "send lag 50.0 ms is above 20 ms" in Lag.of(samples, [0.001], 0.9).limited(0.02)
    assert "event loop lag 30.0 ms" in Lag.of([sample((2.0, 1))], [0.03], 0.9).limited(0.02)
    assert Lag.of(samples, [0.001], 0.9).limited(0.06) is None
