"""Command lines of `vllm bench serve`."""

from __future__ import annotations

import inspect

import pytest

from benthic.cli import bench
from benthic.cli.bench_vllm import REMEDIES, translate
from benthic.errors import ConfigError

FILE = ("--result-filename", "r.json")


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (("--num-prompts", "5", "--save-result", *FILE), ["--num-prompts", "5", "--result", "r.json"]),
        (("--result-dir", "out", *FILE), ["--result", "out/r.json"]),
        (("--result_dir=out", "--result_filename=r.json"), ["--result", "out/r.json"]),
        (("--save-result", "--result", "a_b.json"), ["--result", "a_b.json"]),
        (("--percentile-metrics", "ttft,e2el", "--seed", "-1"), ["--seed", "-1"]),
        (("--metric-percentiles=50,99",), ["--metric-percentiles=50,99"]),
    ],
)
def test_words_of_vllm_become_our_own(words: tuple[str, ...], ours: list[str]) -> None:
    assert translate(words) == ours


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--save-result",), "--save-result: name one file to write. Use --result FILE"),
        (("--result-dir", "out"), "Use --result FILE"),
        (("--result", "a.json", *FILE), "--result-filename: name one file"),
        (("--label", "x"), "--label is a flag of vLLM's. Name the file after it"),
        (("--percentile-metrics", "ttft,rps"), "percentiles of e2el, itl, tpot, ttft are reported"),
        (("--temperature=0",), "--extra-body"),
    ],
)
def test_what_is_not_here_is_refused_with_a_remedy(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        translate(words)


def test_remedies_are_for_flags_that_do_not_exist() -> None:
    ours = {f"--{name.replace('_', '-')}" for name in inspect.signature(bench.serve).parameters}
    assert not ours & REMEDIES.keys()
