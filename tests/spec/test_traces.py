from __future__ import annotations

from pathlib import Path

import pytest

from benthic.errors import ConfigError, DataError
from benthic.spec import traces

GOLDEN = Path(__file__).parents[1] / "golden" / "traces"
AZURE = (GOLDEN / "azure_conv_head.csv").read_text().splitlines()
MOONCAKE = (GOLDEN / "mooncake_conversation_head.jsonl").read_text().splitlines()


def test_azure_lines_become_requests_that_start_at_zero() -> None:
    trace = traces.read_azure(AZURE)
    assert len(trace) == 12
    assert (trace[0].at_s, trace[0].prompt_tokens, trace[0].output_tokens) == (0.0, 374, 44)
    # 18:15:46.6805900 to 18:15:50.9951690
    assert trace[1].at_s == pytest.approx(4.314579, abs=2e-6)
    assert [each.at_s for each in trace] == sorted(each.at_s for each in trace)


def test_mooncake_lines_keep_their_block_hashes() -> None:
    trace = traces.read_mooncake(MOONCAKE)
    assert len(trace) == 10
    assert (trace[0].prompt_tokens, trace[0].output_tokens) == (6758, 500)
    assert trace[0].block_hashes == tuple(range(14))
    assert trace[1].block_hashes[0] == trace[0].block_hashes[0]
    assert all(len(each.block_hashes) == -(-each.prompt_tokens // 512) for each in trace)


def test_a_trace_at_a_rate_has_that_rate_and_its_own_shape() -> None:
    trace = traces.read_azure(AZURE)
    faster = traces.at_rate(trace, 10.0)
    assert traces.mean_rate(faster) == pytest.approx(10.0)
    ratios = {round(b.at_s / a.at_s, 9) for a, b in zip(trace[1:], faster[1:], strict=True)}
    assert len(ratios) == 1
    assert [each.prompt_tokens for each in faster] == [each.prompt_tokens for each in trace]


def test_scaled_lengths_stay_at_least_one_and_lose_their_hashes() -> None:
    scaled = traces.with_lengths_scaled(traces.read_mooncake(MOONCAKE), 0.001)
    assert scaled[0].prompt_tokens == 7
    assert min(each.output_tokens for each in scaled) == 1
    assert not any(each.block_hashes for each in scaled)


def test_requests_that_do_not_fit_are_left_out() -> None:
    trace = traces.read_mooncake(MOONCAKE)
    fitting = traces.that_fit(trace, 7300)
    assert 0 < len(fitting) < len(trace)
    assert all(each.prompt_tokens + each.output_tokens <= 7300 for each in fitting)


def test_a_broken_line_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match="line 4"):
        traces.read_azure([*AZURE[:3], "2023-11-16 18:17:03.9799600,many,10"])
    wrong = '{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}'
    with pytest.raises(DataError, match=r"line 2.*2 hash_ids, but 512 tokens are 1 blocks"):
        traces.read_mooncake([MOONCAKE[0], wrong])
    with pytest.raises(DataError, match="TIMESTAMP,ContextTokens"):
        traces.read_azure(MOONCAKE)
    with pytest.raises(DataError, match="0 requests"):
        traces.read_mooncake([])


def test_a_trace_without_duration_cannot_be_given_a_rate() -> None:
    with pytest.raises(ConfigError, match="span 0 s"):
        traces.at_rate(traces.read_mooncake(MOONCAKE[:1]), 5.0)


def test_lines_that_are_out_of_order_are_refused_with_both_numbers() -> None:
    swapped = [*AZURE[:4], AZURE[5], "", AZURE[4]]
    with pytest.raises(DataError, match=r"line 7 comes \S+ s before line 5 .*Sort the lines"):
        traces.read_azure(swapped)
    later = '{"timestamp": 3000, "input_length": 5, "output_length": 1}'
    sooner = '{"timestamp": 1000, "input_length": 5, "output_length": 1}'
    with pytest.raises(DataError, match=r"line 2 comes 2 s before line 1 .*-2\.0+ and 0\.0+ s"):
        traces.read_mooncake([later, sooner])
    assert [each.at_s for each in traces.read_mooncake([sooner, sooner, later])] == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("timestamp", ["-5", "NaN", "Infinity"])
def test_times_that_cannot_be_are_refused_with_their_line(timestamp: str) -> None:
    good = '{"timestamp": 0, "input_length": 5, "output_length": 1}'
    wrong = f'{{"timestamp": {timestamp}, "input_length": 5, "output_length": 1}}'
    with pytest.raises(DataError, match="line 2 has the timestamp"):
        traces.read_mooncake([good, wrong])
