"""Batch-invariant serving on a GPU in bfloat16: a request's log-probabilities alone, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engine import NANO, is_empty, prompts, random_model, request, serve, small_engine
from test_invariant import MTP, NGRAM, found

pytestmark = pytest.mark.gpu

WIDE = replace(
    NANO,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_position_embeddings=2048,
    initializer_range=0.08,
)
ROOM = {"block_size": 16, "num_blocks": 512, "max_num_seqs": 32, "batch_invariant": True}
CIRCUMSTANCES = {
    "together": {"max_num_batched_tokens": 2048},
    "without graphs": {"enforce_eager": True},
    "in padded graphs": {"cudagraph_capture_sizes": (5, 32)},
    "in chunks of up to 37": {"max_num_batched_tokens": 37},
    "preempted": {"num_blocks": 60},
    "drafted by prediction modules": {"speculative": MTP},
    "drafted, without graphs, in chunks": {
        "speculative": MTP,
        "enforce_eager": True,
        "max_num_batched_tokens": 70,
    },
    "drafted from prompts, preempted": {"speculative": NGRAM, "num_blocks": 60},
    "in the plain loop": {"async_scheduling": False},
}


def asked():
    """24 requests of up to 60 tokens and two whose contexts are cut, some with common beginnings."""
    heads = [*prompts(24, seed=5, shortest=3, longest=60), *prompts(2, seed=6, shortest=520, longest=620)]
    return [
        request(str(i), [*heads[i - i % 2], *([i + 3] * (i % 2))], max_tokens=24, logprobs=3)
        for i in range(len(heads))
    ]


@pytest.fixture(scope="module")
def model():
    return random_model(WIDE).cuda().to(torch.bfloat16)


def one_by_one(model, requests, **options):
    quiet = {"enable_prefix_caching": False, "max_num_seqs": 1, "max_num_batched_tokens": 1024}
    engine = small_engine(model, **(ROOM | quiet | options))
    return found({each.request_id: serve(engine, [each])[each.request_id] for each in requests})


@pytest.fixture(scope="module")
def alone(model):
    return one_by_one(model, asked())


@pytest.mark.parametrize("circumstances", CIRCUMSTANCES)
def test_tokens_and_log_probabilities_are_those_of_a_request_alone(model, alone, circumstances):
    options = CIRCUMSTANCES[circumstances]
    engine = small_engine(model, **(ROOM | options))
    got = found(serve(engine, asked()))
    other = [name for name in alone if got[name][0] != alone[name][0]]
    inexact = [name for name in alone if got[name][1] != alone[name][1]]
    assert (other, inexact) == ([], []), "requests with other tokens, with other log-probabilities"
    assert is_empty(engine)
    stats = engine.stats()
    assert (stats.preemptions > 0) == (options.get("num_blocks") == 60)
    assert (stats.drafts > 0) == ("speculative" in options)


def test_an_answer_that_comes_back_in_a_prompt_is_as_good_cached_as_computed_again(model, alone):
    again = [
        request(each.request_id, [*each.prompt, *alone[each.request_id][0], 7], max_tokens=8, logprobs=3)
        for each in asked()
    ]
    engine = small_engine(model, **ROOM)
    serve(engine, asked())
    answers = serve(engine, again)
    assert sum(answer.deltas[0].cached_tokens for answer in answers.values()) > 1000
    assert found(answers) == one_by_one(model, again)


def test_an_ordinary_engine_gives_other_bits_in_a_batch_than_alone_or_this_mode_has_nothing_to_do(model):
    ordinary = {"batch_invariant": False, "enforce_eager": True}  # graphs pad all of these steps alike
    together = found(serve(small_engine(model, **(ROOM | ordinary)), asked()))
    assert together != one_by_one(model, asked(), **ordinary)
