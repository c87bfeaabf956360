from __future__ import annotations

import pytest

from benthic.errors import ConfigError
from benthic.spec.objectives import Latencies, Objectives


def test_targets_are_read_in_milliseconds_with_vllms_names() -> None:
    found = Objectives.parse(["ttft:200", "tpot:50.5 e2el:3000"])
    assert found == Objectives(ttft_s=0.2, tpot_s=0.0505, e2e_s=3.0)
    assert str(found) == "ttft:200 tpot:50.5 e2el:3000"
    assert Objectives.parse([]) is None


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("tpto:5", "Did you mean 'tpot'"),
        ("ttft", "NAME:MILLISECONDS"),
        ("ttft:-1", "NAME:MILLISECONDS"),
        ("ttft:nan", "NAME:MILLISECONDS"),
        ("ttft:1 ttft:2", "given twice"),
    ],
)
def test_a_target_that_cannot_be_meant_is_refused(word: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Objectives.parse([word])


def test_every_bound_must_hold_at_once() -> None:
    bounds = Objectives(ttft_s=0.2, tpot_s=0.05)
    assert bounds.met(Latencies(ttft_s=0.2, tpot_s=0.05, e2e_s=99.0))
    assert not bounds.met(Latencies(ttft_s=0.21, tpot_s=0.01, e2e_s=1.0))
    assert not bounds.met(Latencies(ttft_s=0.01, tpot_s=0.051, e2e_s=1.0))
    assert not Objectives(e2e_s=0.5).met(Latencies(ttft_s=0.1, tpot_s=None, e2e_s=0.6))


def test_a_request_of_one_token_has_no_tpot_to_miss() -> None:
    assert Objectives(tpot_s=0.001).met(Latencies(ttft_s=0.1, tpot_s=None, e2e_s=0.1))
