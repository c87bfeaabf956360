"""Steps out of packed inputs, with tokens drawn and drafts judged on the device: the tokens stay the same.

On a CPU a "graph" is its function called again, so that all but the capture runs here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engine import NANO, is_empty, random_model, request, serve, small_engine
from test_overlap import mixed_requests
from test_speculate import mixed, speculative
from trained import starts, trained_model

from benthic.kernels import ops
from benthic.serve import build
from benthic.serve.graphs import GraphSizes


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(build, "graph_sizes", lambda options, _: GraphSizes((1, 2, 5, options.max_num_seqs)))


def tokens(engine, asked):
    answers = serve(engine, asked)
    assert is_empty(engine)
    return {name: answer.tokens for name, answer in answers.items()}


def counted(graphs) -> list[int]:
    replayed, replay = [], graphs.replay
    graphs.replay = lambda size: (replayed.append(size), replay(size))
    return replayed


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain loop", "overlapped"])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 24}], ids=str)
def test_every_kind_of_request_gets_the_tokens_of_plain_steps(overlapped, options):
    plain = tokens(small_engine(enforce_eager=True, async_scheduling=False), mixed_requests())
    engine = small_engine(async_scheduling=overlapped, **options)
    replayed = counted(engine._runner.graphs[1])
    assert tokens(engine, mixed_requests()) == plain
    assert {1, 2, 5, 8} >= set(replayed) > {1}


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain loop", "overlapped"])
@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_drafts_judged_by_a_graph_are_those_that_hold(method, overlapped):
    asked = [request(str(i), p, max_tokens=3 + 4 * i) for i, p in enumerate(starts(9, seed=5))]
    model = trained_model()
    plain = small_engine(model, enforce_eager=True, speculative=speculative(method), block_size=64)
    expected = tokens(plain, asked)
    engine = small_engine(model, speculative=speculative(method), block_size=64, async_scheduling=overlapped)
    learnt = counted(engine._runner.tails[4]) if method == "mtp" else [1]
    assert tokens(engine, asked) == expected
    assert learnt
    if not overlapped:
        assert engine.stats().accepted_at == plain.stats().accepted_at


def test_sampled_and_greedy_batches_take_turns_and_small_blocks_cost_acceptance_alone():
    model = trained_model()
    expected = serve(small_engine(model, enforce_eager=True), mixed())
    engine = small_engine(model, speculative=speculative(), block_size=3)
    found = serve(engine, mixed())
    assert {name: a.tokens for name, a in found.items()} == {name: a.tokens for name, a in expected.items()}
    assert engine.stats().accepted_tokens > 0
    greedy = [request(str(i), p, max_tokens=30) for i, p in enumerate(starts(6, seed=8))]
    assert tokens(engine, greedy) == tokens(small_engine(model, enforce_eager=True), greedy)


def test_requests_that_draw_differently_are_not_given_the_graphs_tokens():
    plain, engine = small_engine(enforce_eager=True), small_engine()
    kinds = [
        {},
        {"logit_bias": {9: 50.0}},
        {"min_tokens": 6},
        {"repetition_penalty": 1.8},
        {"temperature": 1.0},
    ]
    for kind in kinds:
        asked = [request("a", [5, 6, 7], max_tokens=8, seed=3, **kind)]
        assert tokens(engine, asked) == tokens(plain, asked), kind


def test_a_row_without_a_finite_best_fails_alone():
    model = random_model()
    engine = small_engine(model)
    bad = 7
    with torch.no_grad():
        model.embed.weight[bad] = torch.nan
    answers = serve(engine, [request("bad", [3, bad]), request("good", [3, 4, 5])])
    assert answers["bad"].finish == "error"
    assert len(answers["good"].tokens) == 8


def test_a_prompt_of_one_token_is_a_row_among_decodes():
    asked = [request("long", [3, 4, 5], max_tokens=9), request("one", [7], prompt_logprobs=0)]
    plain = tokens(small_engine(enforce_eager=True), asked)
    engine = small_engine()
    replayed = counted(engine._runner.graphs[1])
    assert tokens(engine, asked[1:]) == {"one": plain["one"]}
    assert replayed
    assert tokens(engine, asked) == plain


def test_an_idle_graph_stores_nothing_whatever_it_ran_before():
    model = random_model(replace(NANO, num_nextn_predict_layers=1))
    engine = small_engine(model, speculative=speculative())
    tokens(engine, [request(str(i), [3 + i, 4, 5], max_tokens=9) for i in range(5)])
    runner = engine._runner
    before = runner.cache.pages_LPBW.clone()
    assert {type(each).__name__ for each in runner.all_graphs} == {"StepGraphs", "TailGraphs", "ModuleGraphs"}
    with torch.inference_mode():
        for graphs in runner.all_graphs:
            for size in graphs.sizes:
                graphs.idle(size)
    assert torch.equal(runner.cache.pages_LPBW, before)


def test_no_expert_works_for_rows_that_pad_a_batch_alone(monkeypatch):
    engine, permute, seen = small_engine(), ops.permute, []

    def watched(x_TD, expert_TK, experts, *, slot_T=None):
        permuted = permute(x_TD, expert_TK, experts, slot_T=slot_T)
        if len(x_TD) == 5 and slot_T is not None and 0 < int((slot_T >= 0).sum()) < 5:
            before = permuted.ends_E - permuted.ends_E.diff(prepend=permuted.ends_E.new_zeros(1))
            working = (permuted.ends_E > before).nonzero().flatten().tolist()
            seen.append((sorted(set(expert_TK[slot_T >= 0].flatten().tolist())), working))
        return permuted

    monkeypatch.setattr(ops, "permute", watched)
    tokens(engine, [request(str(i), [3 + i, 4, 5], max_tokens=9) for i in range(3)])
    assert len(seen) > 8
    assert all(wanted == working for wanted, working in seen)
