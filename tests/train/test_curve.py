from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.train.curve import Curve, cosine, warmup

# DeepSeek-V3 report section 4.2: constant to 10 T tokens, cosine over 4.3 T, 333 B, then 167 B.
REPORT_LR = "2.2e-4@10T,cosine:2.2e-5@4.3T,2.2e-5@333B,7.3e-6"


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0, 2.2e-4),
        (10 * 10**12 - 1, 2.2e-4),
        (10 * 10**12 + 2_150 * 10**9, (2.2e-4 + 2.2e-5) / 2),
        (14_300 * 10**9, 2.2e-5),
        (14_632 * 10**9, 2.2e-5),
        (14_633 * 10**9, 7.3e-6),
        (14_800 * 10**9, 7.3e-6),
    ],
)
def test_report_learning_rate_curve_has_the_values_of_the_report(tokens: int, value: float) -> None:
    assert Curve.parse(REPORT_LR).at(tokens) == pytest.approx(value, rel=1e-9)


def test_report_bias_speed_and_mtp_weight_step_at_their_token_counts() -> None:
    gamma, weight = Curve.parse("0.001@14.3T,0"), Curve.parse("0.3@10T,0.1")
    assert [gamma.at(n) for n in (0, 14_299 * 10**9, 14_300 * 10**9)] == [0.001, 0.001, 0.0]
    assert [weight.at(n) for n in (0, 10**13 - 1, 10**13)] == [0.3, 0.3, 0.1]


def test_linear_piece_travels_from_the_value_before() -> None:
    curve = Curve.parse("1@10,linear:3@20,5")
    assert [curve.at(n) for n in (0, 10, 20, 30)] == [1.0, 1.0, 2.0, 5.0]


@pytest.mark.parametrize("text", [REPORT_LR, "0.3", "1@7,linear:2@3K,0.5"])
def test_curve_reads_back_what_it_writes(text: str) -> None:
    curve = Curve.parse(text)
    assert Curve.parse(str(curve)) == curve


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosine:1@5", "nothing to start from"),
        ("1,2", "lasts for ever"),
        ("1@5,linear:2", "travelling for ever"),
        ("1@0,2", "no tokens"),
        ("wave:1@5", "'wave:1@5' in 'wave:1@5'"),
        ("", "is no piece"),
        ("1@5X", "is no piece"),
    ],
)
def test_malformed_curve_is_refused_with_its_text(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Curve.parse(text)


def test_warmup_is_linear_and_ends_at_one() -> None:
    assert [warmup(step, 4) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert warmup(1, 0) == 1.0


@given(st.floats(0, 1), st.floats(0, 1))
def test_cosine_stays_between_its_ends(fraction: float, final: float) -> None:
    assert min(1.0, final) - 1e-12 <= cosine(fraction, final) <= 1.0 + 1e-12
    assert math.isclose(cosine(1.0, final), final, abs_tol=1e-12)
