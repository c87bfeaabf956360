"""Batch-invariant serving: the same log-probabilities to the last bit, whatever else the engine is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import NANO, is_empty, prompts, random_model, request, serve, small_engine

from benthic.errors import ConfigError
from benthic.kernels.native import build_refusal
from benthic.serve.engine import Engine
from benthic.serve.invariant import InvariantAttend
from benthic.serve.options import EngineOptions
from benthic.serve.speculative import Speculative

if TYPE_CHECKING:
    from benthic.serve.messages import Generate

needs_compiler = pytest.mark.skipif(build_refusal() is not None, reason=str(build_refusal()))
MTP = Speculative(method="mtp", num_speculative_tokens=3, adaptive=False)
NGRAM = Speculative(method="ngram", num_speculative_tokens=2, adaptive=False)
ALONE = {"enable_prefix_caching": False, "max_num_seqs": 1, "max_num_batched_tokens": 128}
# A batch as it comes, and all that may come between: short chunks, preemption, drafts, cached prefixes.
CIRCUMSTANCES = {
    "together": {},
    "in chunks of up to 9": {"max_num_batched_tokens": 9},
    "preempted": {"num_blocks": 24},
    "drafted by prediction modules": {"speculative": MTP},
    "drafted from prompts, in chunks": {"speculative": NGRAM, "max_num_batched_tokens": 11},
    "drafted, preempted, overlapped": {"speculative": MTP, "num_blocks": 24, "async_scheduling": True},
}


def asked(count: int = 6, *, tokens: int = 12) -> list[Generate]:
    """Prompts of which every second begins like the one before it; greedy, seeded and scored ones."""
    heads = prompts(count, seed=5, shortest=9, longest=40)
    kinds: list[dict] = [{}, {"prompt_logprobs": 1}, {"temperature": 0.8}]
    return [
        request(
            str(i),
            [*heads[i - i % 2], *([i + 3] * (i % 2))],
            max_tokens=tokens,
            logprobs=2,
            seed=i,
            **kinds[i % 3],
        )
        for i in range(count)
    ]


def found(answers) -> dict:
    """Tokens, and every log-probability of theirs, of their rivals and of prompts, as exact numbers."""
    return {
        name: (
            answer.tokens,
            [[(entry.token, entry.logprob) for entry in row] for row in answer.logprobs],
            [delta.prompt_logprobs for delta in answer.deltas if delta.prompt_logprobs],
        )
        for name, answer in answers.items()
    }


def one_by_one(model, requests) -> dict:
    engine = small_engine(model, batch_invariant=True, **ALONE)
    return found({each.request_id: serve(engine, [each])[each.request_id] for each in requests})


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def alone(model):
    return one_by_one(model, asked())


@needs_compiler
@pytest.mark.parametrize("circumstances", CIRCUMSTANCES)
def test_log_probabilities_are_those_of_a_request_alone_to_the_last_bit(model, alone, circumstances):
    options = CIRCUMSTANCES[circumstances]
    engine = small_engine(model, batch_invariant=True, **options)
    got = found(serve(engine, asked()))
    for name, expected in alone.items():
        assert got[name] == expected, name
    assert is_empty(engine)
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("num_blocks" in options)
    assert (stats.drafts > 0) == ("speculative" in options)


@needs_compiler
def test_an_answer_that_comes_back_in_a_prompt_is_as_good_cached_as_computed_again(model, alone):
    again = [
        request(each.request_id, [*each.prompt, *alone[each.request_id][0], 7], max_tokens=5, logprobs=3)
        for each in asked()
    ]
    engine = small_engine(model, batch_invariant=True)
    serve(engine, asked())
    answers = serve(engine, again)
    for each in again:
        assert answers[each.request_id].deltas[0].cached_tokens >= len(each.prompt) - 8
    assert found(answers) == one_by_one(model, again)


@needs_compiler
def test_the_scores_are_those_of_an_ordinary_engine_but_for_rounding(model, alone):
    ordinary = found(serve(small_engine(model), asked()))
    assert {name: row[0] for name, row in ordinary.items()} == {name: row[0] for name, row in alone.items()}
    assert ordinary != alone, "then this mode has nothing to do, and its tests show nothing"
    for name, (_, rows, _) in ordinary.items():
        for row, own in zip(rows, alone[name][1], strict=True):
            torch.testing.assert_close([x for _, x in row], [x for _, x in own], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_no_tape_and_no_expanded_attention_takes_part(model):
    runner = small_engine(model, batch_invariant=True)._runner
    assert runner.tapes is None
    assert runner._plugs.attend is InvariantAttend


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2}, "needs tensor_parallel_size = 1, not 2"),
        ({"quantization": "fp8"}, 'multiplies no FP8 weights, but quantization = "fp8"'),
    ],
    ids=str,
)
def test_options_that_break_the_promise_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        EngineOptions(batch_invariant=True, **options)


def test_a_dtype_that_has_no_product_by_row_on_a_cpu_is_refused():
    model = random_model(NANO).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"takes float32, not torch\.bfloat16"):
        Engine.of(model, EngineOptions(batch_invariant=True), eos=(1,))
