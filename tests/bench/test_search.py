from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import FakeServer, jump

from benthic.bench.load import Load
from benthic.bench.samples import Lag
from benthic.bench.scenario import Scenario, Sweep
from benthic.bench.search import Found, Search, Trial, find_goodput
from benthic.bench.workload import RandomSource, TokenRange
from benthic.errors import ConfigError, ServeError
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from collections.abc import Callable


def search(attainment_at: Callable[[float], float], **options: float) -> Found:
    async def run(rate: float) -> Trial:
        return Trial(attainment=attainment_at(rate))

    return asyncio.run(find_goodput(run, Search(**options)))


@given(st.floats(0.01, 3000.0), st.floats(0.01, 3000.0))
def test_the_rate_found_passes_and_one_little_above_fails(knee: float, start: float) -> None:
    found = search(lambda rate: 1.0 if rate <= knee else 0.5, start=start, precision=0.05)
    assert found.rate <= knee
    assert found.failed > knee
    assert found.failed - found.rate <= 0.05 * found.failed
    assert len(found.trials) < 30


def test_a_server_that_bears_everything_gives_a_lower_bound() -> None:
    found = search(lambda _: 1.0, start=3.0, most=50.0)
    assert (found.rate, found.failed) == (50.0, math.inf)


def test_a_server_that_bears_nothing_gives_zero() -> None:
    found = search(lambda _: 0.0, start=1.0, least=0.1)
    assert (found.rate, found.failed) == (0.0, 0.1)


def test_the_share_that_must_attain_is_a_setting() -> None:
    falling = lambda rate: 1.0 - rate / 100.0  # noqa: E731
    assert search(falling, attainment=0.9, precision=0.01).rate == pytest.approx(10.0, rel=0.02)
    assert search(falling, attainment=0.5, precision=0.01).rate == pytest.approx(50.0, rel=0.02)


def test_a_spoiled_run_ends_the_search() -> None:
    async def run(_: float) -> Trial:
        return Trial(attainment=1.0, spoiled="the client was late")

    with pytest.raises(ServeError, match="at 1 requests/s the client was late"):
        asyncio.run(find_goodput(run, Search()))


@pytest.mark.parametrize("wrong", [{"attainment": 0.0}, {"precision": 1.0}, {"start": 0.0}])
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Search(**wrong)


def waits_at_most(t: float, load: float) -> float:
    """M/D/1 with service time 1: the share that waits no longer than `t` (Erlang, 1909)."""
    terms = ((load * (k - t)) ** k / math.factorial(k) * math.exp(-load * (k - t)) for k in range(int(t) + 1))
    return (1.0 - load) * sum(terms)


def test_the_goodput_of_a_serial_server_lies_where_queueing_theory_puts_it() -> None:
    """Service takes 10 ms and the target is 30, so 90 % must wait no longer than two services."""

    async def scenario(clock) -> Found:
        server = FakeServer(clock, ttft_s=0.01, serial=True)
        tokens = TokenRange(first=0, last=100)
        sweep = Sweep(
            scenario=Scenario(
                source=RandomSource(tokens=tokens, input_len=2, output_len=1), count=2000, seed=5
            ),
            load=Load(send=server.send, clock=clock),
            objectives=Objectives(ttft_s=0.03),
            percentiles=(50.0,),
            max_lag_s=math.inf,
            on_start=lambda rate, count: None,
            on_point=lambda point: None,
        )

        async def trial(rate: float) -> Trial:
            return (await sweep.at(rate)).trial

        return await find_goodput(trial, Search(start=20.0, precision=0.02))

    found = jump(scenario).rate
    assert waits_at_most(2.0, 0.01 * found) == pytest.approx(0.9, abs=0.02)
    assert found == pytest.approx(58.7, rel=0.06)


def test_lag_without_samples_is_zero() -> None:
    assert Lag.of([], [], 0.0).send_max == 0.0
