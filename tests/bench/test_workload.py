from __future__ import annotations

from pathlib import Path

import pytest

from benthic.bench import workload
from benthic.bench.workload import RandomSource, TextSource, TokenRange, TraceSource, Work
from benthic.errors import ConfigError, DataError
from benthic.spec import traces

GOLDEN = Path(__file__).parents[1] / "golden" / "traces"
TOKENS = TokenRange(first=2, last=50, excluded=frozenset({7}))


def test_random_prompts_have_the_lengths_asked_and_no_special_tokens() -> None:
    source = RandomSource(tokens=TOKENS, input_len=40, output_len=10, range_ratio=0.5, prefix_len=8, seed=1)
    works = source.works(300, run=1)
    assert {len(work.prompt) - 8 for work in works} == set(range(20, 61))
    assert {work.output_tokens for work in works} == set(range(5, 16))
    assert len({work.prompt[:8] for work in works}) == 1
    used = {token for work in works for token in work.prompt}
    assert used == set(range(2, 50)) - {7}


def test_the_same_seed_gives_the_same_prompts_and_another_run_gives_others() -> None:
    source = RandomSource(tokens=TOKENS, input_len=40, output_len=10, seed=1)
    assert source.works(5, run=1) == source.works(5, run=1)
    assert source.works(5, run=1) != source.works(5, run=2)


def test_equal_hashes_of_a_trace_become_equal_prefixes() -> None:
    trace = traces.read_mooncake((GOLDEN / "mooncake_conversation_head.jsonl").read_text().splitlines())
    works = TraceSource(trace=trace, tokens=TOKENS).works(4, run=1)
    assert [len(work.prompt) for work in works] == [each.prompt_tokens for each in trace[:4]]
    assert works[0].prompt[:512] == works[1].prompt[:512]
    assert works[0].prompt[512:1024] != works[1].prompt[512:1024]


def test_a_vocabulary_without_tokens_to_choose_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="need 2 token ids"):
        TokenRange(first=3, last=4)


SHAREGPT = """[
 {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
 {"conversations": [{"from": "gpt", "value": "skipped"}]},
 {"messages": [{"role": "user", "content": "why?"}]}
]"""


def test_sharegpt_gives_first_human_turns() -> None:
    works = workload.read_sharegpt(SHAREGPT, output_len=9)
    assert works == (Work(prompt="hi", output_tokens=9), Work(prompt="why?", output_tokens=9))
    with pytest.raises(DataError, match="0 prompts"):
        workload.read_sharegpt("[]", output_len=None)


def test_prompt_files_are_plain_or_json_lines() -> None:
    plain = workload.read_prompts("one\n\ntwo\n", json_lines=False, output_len=None)
    assert [work.prompt for work in plain] == ["one", "two"]
    json_lines = '{"prompt": "a", "output_tokens": 5}\n{"prompt": "b"}'
    found = workload.read_prompts(json_lines, json_lines=True, output_len=None)
    assert [work.output_tokens for work in found] == [5, workload.DEFAULT_OUTPUT]
    with pytest.raises(DataError, match="object 1 has no text"):
        workload.read_prompts('{"text": "a"}', json_lines=True, output_len=None)
    with pytest.raises(DataError, match="neither a JSON list"):
        workload.read_prompts("{", json_lines=True, output_len=None)


def test_more_prompts_than_the_file_has_go_round() -> None:
    source = TextSource(texts=workload.read_prompts("a\nb\nc", json_lines=False, output_len=1))
    works = source.works(7, run=0)
    assert {work.prompt for work in works[:3]} == {"a", "b", "c"}
    assert works[3:6] == works[:3]
