"""Steps with prompts out of padded buffers: the same states, the same tokens, whatever stands beside.

On a CPU a "graph" is its function called again, so that all but the capture runs here.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_engine import NANO, is_empty, prompts, random_model, request, serve, small_engine
from test_overlap import mixed_requests
from test_speculate import speculative

from benthic.sched.graph_sizes import prompt_sizes, sizes_beside
from benthic.serve import build
from benthic.serve.graphs import GraphSizes
from benthic.serve.prompt_graphs import CHUNKS, CONTEXT_ROWS, bounds

SIZES = (6, 16, 33, 64)


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(build, "graph_sizes", lambda options, _: GraphSizes((2, options.max_num_seqs), SIZES))


def tokens(engine, asked):
    answers = serve(engine, asked)
    assert is_empty(engine)
    return {name: answer.tokens for name, answer in answers.items()}


def watched(engine) -> dict[str, list[tuple[int, int]]]:
    """What each kind of graph ran: rows of the step, and of the graph."""
    seen: dict[str, list[tuple[int, int]]] = {graphs.what: [] for graphs in engine._runner.prompts}
    for graphs in engine._runner.prompts:

        def run(rows, step, size, *, graphs=graphs, run=graphs.run):
            seen[graphs.what].append((len(rows.position_T), size))
            return run(rows, step, size)

        graphs.run = run
    return seen


@pytest.mark.parametrize(
    ("overlapped", "options"),
    [(False, {}), (True, {}), (True, {"num_blocks": 24}), (True, {"kv_cache_dtype": "fp8"})],
    ids=str,
)
def test_every_kind_of_request_gets_the_tokens_of_plain_steps(overlapped, options):
    settings = {"max_num_batched_tokens": 48, "async_scheduling": overlapped, **options}
    plain = tokens(small_engine(enforce_eager=True, **settings), mixed_requests())
    engine = small_engine(**settings)
    seen = watched(engine)
    assert tokens(engine, mixed_requests()) == plain
    alone, cached_alone, whole, cached = seen.values()
    assert whole, "some steps have whole prompts beside decodes"
    assert cached, "and in some, chunks continue"
    ran = alone + cached_alone + whole + cached
    assert all(rows <= size for rows, size in ran)
    assert any(rows < size for rows, size in ran)


def test_prompts_alone_attend_to_nothing_in_the_latent_space(monkeypatch):
    asked = [request(str(i), p, max_tokens=1) for i, p in enumerate(prompts(5, seed=4, longest=60))]
    settings = {"max_num_batched_tokens": 48}
    plain = tokens(small_engine(enforce_eager=True, **settings), asked)
    engine = small_engine(**settings)
    seen = watched(engine)

    def refused(*_args, **_options):
        raise AssertionError

    monkeypatch.setattr("benthic.serve.attend.mla_decode", refused)
    assert tokens(engine, asked) == plain
    alone, cached_alone, *others = seen.values()
    assert alone
    assert cached_alone
    assert not any(others)


def test_states_of_a_step_are_those_of_the_step_as_written():
    """Two decodes, a whole prompt, a chunk in the middle of one and a chunk at its end, in one step."""
    engines = [small_engine(enforce_eager=eager, max_num_batched_tokens=40) for eager in (True, False)]
    found = []
    for engine in engines:
        results, run = [], engine._runner.run

        def noted(plan, drafts=None, *, results=results, run=run):
            result = run(plan, drafts)
            results.append((plan.num_tokens, result.hidden_TD.clone(), result.logits_SV.clone()))
            return result

        engine._runner.run = noted
        serve(engine, [request(str(i), p) for i, p in enumerate(prompts(7, seed=3, longest=90))])
        found.append(results)
    assert len(found[0]) == len(found[1])
    for plain, replayed in zip(*found, strict=True):
        assert plain[0] == replayed[0]
        torch.testing.assert_close(replayed[1], plain[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(replayed[2], plain[2], rtol=1e-4, atol=1e-4)


def test_rows_that_pad_write_nothing_and_make_nothing_infinite():
    engine = small_engine()
    cache, graphs = engine._runner.cache, engine._runner.prompts
    before = cache.pages_LPBW.clone()
    with torch.inference_mode():
        for each in graphs:
            for size in each.sizes:
                each.idle(size)
                assert each._buffers.hidden_TD[:size].isfinite().all()
    assert torch.equal(cache.pages_LPBW, before)


def test_drafting_modules_learn_from_recorded_prompts():
    model = random_model(replace(NANO, num_nextn_predict_layers=1))
    asked = [request(str(i), p, max_tokens=6 + 3 * i) for i, p in enumerate(prompts(7, seed=4))]
    settings = {"speculative": speculative(), "async_scheduling": False}
    plain = small_engine(model, enforce_eager=True, **settings)
    expected = tokens(plain, asked)
    engine = small_engine(model, **settings)
    seen = watched(engine)
    assert tokens(engine, asked) == expected
    assert engine.stats().accepted_at == plain.stats().accepted_at
    assert engine.stats().drafts > 0
    assert [what for what, ran in seen.items() if ran and what.endswith("of 4 rows")], "chunks beside drafts"


def test_a_bad_prompt_fails_alone_in_a_recorded_step():
    model, bad = random_model(), 7
    with torch.no_grad():
        model.embed.weight[bad] = torch.nan
    engine = small_engine(model)
    answers = serve(engine, [request("bad", [3, bad, 4]), request("good", [3, 4, 5])])
    assert answers["bad"].finish == "error"
    assert (
        answers["good"].tokens
        == tokens(small_engine(enforce_eager=True), [request("good", [3, 4, 5])])["good"]
    )


def test_what_no_graph_holds_runs_as_written():
    engine = small_engine(max_num_batched_tokens=128)
    seen = watched(engine)
    long = request("long", prompts(1, shortest=90, longest=90)[0])
    assert tokens(engine, [long]) == tokens(
        small_engine(enforce_eager=True, max_num_batched_tokens=128), [long]
    )
    assert not any(seen.values()), "90 rows are more than the largest graph's"


def test_few_decodes_take_graphs_of_their_own(monkeypatch):
    monkeypatch.setattr("benthic.serve.prompt_graphs.FEW_DECODES", 2)
    engine = small_engine()
    seen = watched(engine)
    plain = tokens(small_engine(enforce_eager=True), mixed_requests())
    assert tokens(engine, mixed_requests()) == plain
    assert [what.split(" up to ")[-1].split(" of ")[0] for what in seen] == [
        *("whole prompts alone", "chunks", "2 decodes", "2 decodes", "8 decodes", "8 decodes")
    ]
    assert sum(map(bool, seen.values())) > 2


def test_bounds_name_every_row_once_and_every_row_of_context():
    engine = small_engine(enforce_eager=True, max_num_batched_tokens=40)
    steps, run = [], engine._runner._hidden
    engine._runner._hidden = lambda rows, step: (steps.append(rows), run(rows, step))[1]
    serve(engine, [request(str(i), p) for i, p in enumerate(prompts(7, seed=3, longest=90))])
    steps = [rows for rows in steps if rows.chunks]
    assert len(steps) > 5
    for rows in steps:
        border = 0 if rows.decode is None else len(rows.decode.slot_S)
        rows_B, context_B = bounds(rows, border, 64).tolist()
        assert len(rows_B) == CHUNKS + 3
        assert rows_B[:2] == [0, border]
        assert [b - a for a, b in pairwise(rows_B)][1 : len(rows.chunks) + 1] == [
            c.length for c in rows.chunks
        ]
        assert rows_B[-1] == 64
        seen = [b - a for a, b in pairwise(context_B)]
        assert seen[1 : len(rows.chunks) + 1] == [c.start + c.length for c in rows.chunks]
        if any(chunk.start for chunk in rows.chunks):
            assert seen[0] == sum(seen[len(rows.chunks) + 1 :]) == 0
        else:
            assert context_B == rows_B


def test_sizes_rise_to_the_most_rows_of_a_step():
    assert prompt_sizes(0) == ()
    assert prompt_sizes(8) == (8,)
    assert prompt_sizes(300) == (64, 128, 256, 300)
    most = prompt_sizes(4096)
    assert most[-3:] == (3072, 3584, 4096)
    assert len(most) == 14
    assert max(b / a for a, b in pairwise(most)) == 2
    assert most[-1] <= CONTEXT_ROWS
    beside = sizes_beside(most, 64)
    assert {64, 128, 192, 576, 1088, 2112, 4096} < set(beside)
    assert beside[-1] == 4096
    assert len(beside) == 15
    assert sizes_beside(most, 0) == most
    assert sizes_beside((8,), 64) == (8,)


def test_a_step_that_is_recorded_makes_its_own_lists_of_tiles():
    for graphs in small_engine()._runner.prompts:
        once, again = (graphs.layout(SIZES[0]).prefill for _ in range(2))
        assert once.cu_seqlens_q.data_ptr() == again.cu_seqlens_q.data_ptr()
        assert once.lists is not again.lists
