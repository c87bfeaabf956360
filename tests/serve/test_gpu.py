"""The engine on a GPU: graphs, overlap and FP8 beside the plain loop, and no wait in a step but the last."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engine import NANO, is_empty, prompts, random_model, request, serve, small_engine
from test_graphs import planned
from test_overlap import mixed_requests

from benthic.kernels.launch import in_turn
from benthic.model.local import LocalExchange, plain_linear
from benthic.model.sockets import Sockets, at_once
from benthic.sched.plans import TableWrite
from benthic.serve.attend import PagedAttend
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.drafts import Drafts
from benthic.serve.graphs import Served
from benthic.serve.plugs import Plugs
from benthic.serve.speculative import Speculative
from benthic.serve.step_graphs import StepBuffers, StepGraphs
from benthic.serve.steps import StepBuilder

pytestmark = pytest.mark.gpu

# Widths that GPU kernels take, gate and up of whole FP8 blocks.
ROUND = replace(
    NANO,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=128,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    initializer_range=0.08,
)


def gpu_model(dtype=torch.float32):
    return random_model(ROUND).cuda().to(dtype)


def tokens(engine, asked=None):
    answers = serve(engine, asked or mixed_requests())
    assert is_empty(engine)
    return {name: answer.tokens for name, answer in answers.items()}


@pytest.fixture(scope="module")
def plain():
    engine = small_engine(gpu_model(), enforce_eager=True, async_scheduling=False)
    assert not engine._runner.graphs
    return tokens(engine)


def test_plain_steps_give_the_tokens_of_the_cpu(plain):
    assert tokens(small_engine(random_model(ROUND))) == plain


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain loop", "overlapped"])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 24}, {"cudagraph_capture_sizes": (3,)}], ids=str)
def test_graphs_and_overlap_give_the_tokens_of_the_plain_loop(plain, overlapped, options):
    engine = small_engine(gpu_model(), async_scheduling=overlapped, **options)
    graphs, replayed = engine._runner.graphs[1], []
    replay = graphs.replay
    graphs.replay = lambda size: (replayed.append(size), replay(size))
    assert tokens(engine) == plain
    assert len(graphs) == len(graphs.sizes)
    assert len(set(replayed)) >= 2


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_verified_drafts_give_the_tokens_of_the_plain_loop_and_wait_for_nothing(method, eager, plain):
    chosen = Speculative(method=method, num_speculative_tokens=2, adaptive=False)
    engine = small_engine(gpu_model(), enforce_eager=eager, speculative=chosen)
    assert tokens(engine) == plain
    assert engine.stats().drafts > 0
    assert sorted(engine._runner.graphs) == ([] if eager else [1, 2, 3])
    graphs = [*engine._runner.modules.values(), *engine._runner.tails.values()]
    assert len(graphs) == (6 if method == "mtp" and not eager else 0)
    assert all(len(each) == len(each.sizes) for each in graphs)
    in_error_mode(engine)
    assert tokens(engine) == plain


def test_overlapped_bfloat16_equals_its_plain_loop_when_batches_are_alike():
    asked = [
        request(str(i), p, max_tokens=24) for i, p in enumerate(prompts(8, seed=3, shortest=20, longest=20))
    ]
    options = {"max_num_batched_tokens": 256}
    loops = [
        tokens(small_engine(gpu_model(torch.bfloat16), async_scheduling=o, **options), asked)
        for o in (False, True)
    ]
    assert loops[0] == loops[1]


@pytest.mark.parametrize("how", [{}, {"kv_cache_dtype": "fp8"}, {"quantization": "fp8"}], ids=str)
def test_recorded_steps_with_prompts_leave_the_states_of_steps_as_written(how):
    found, asked = [], [request(str(i), p) for i, p in enumerate(prompts(9, seed=3, shortest=2, longest=90))]
    for size in (0, 4096):
        settings = {"max_num_batched_tokens": 80, "max_prompt_graph_size": size, "async_scheduling": False}
        engine, results = small_engine(gpu_model(torch.bfloat16), **settings, **how), []
        run, replayed = engine._runner.run, []
        for graphs in engine._runner.prompts:
            graphs.replay = lambda size, replay=graphs.replay, to=replayed: (to.append(size), replay(size))

        def noted(plan, drafts=None, *, run=run, results=results):
            result = run(plan, drafts)
            results.append((plan, result.hidden_TD.float().clone()))
            return result

        engine._runner.run = noted
        serve(engine, asked)
        found.append(results)
        assert set(replayed) == ({64, 80} if size else set())
    both = [(a, b) for a, b in zip(*found, strict=False) if a[0].prefills]
    first = both[: next(i for i, (a, b) in enumerate(both) if a[0].decode_slots and b[0].decode_slots) + 1]
    assert len(first) > 1
    for (plan, expected_TD), (other, states_TD) in first:
        assert plan.num_tokens == other.num_tokens
        assert ((states_TD - expected_TD).norm() / expected_TD.norm()).item() < 0.02


@pytest.mark.parametrize("queries", [1, 3])
def test_a_graph_of_verification_rows_computes_what_the_plain_step_does(queries):
    model = gpu_model()
    layout = CacheLayout.of(ROUND, block_size=4, dtype=torch.float32)
    contexts = torch.tensor([9, 4, 17], dtype=torch.int32, device="cuda")
    table = torch.randperm(20, device="cuda")[:15].view(3, 5).to(torch.int32)
    last = torch.arange(queries, device="cuda") - queries
    positions = (contexts[:, None] + last).flatten().long()
    owner = torch.arange(3, device="cuda").repeat_interleave(queries)
    slots = table[owner, positions // 4].long() * 4 + positions % 4
    steps = StepBuilder(
        max_num_seqs=4, max_model_len=32, block_size=4, device=torch.device("cuda"), drafts=queries - 1
    )
    steps.write([TableWrite(slot, 0, tuple(row)) for slot, row in enumerate(table.tolist())])
    steps.remember((0, 1, 2), torch.tensor([7, 8, 9], device="cuda"))
    plan = planned({s: n - queries for s, n in enumerate(contexts.tolist())}, drafts=queries - 1)
    offered = torch.arange(3 * (queries - 1), device="cuda").view(3, -1) + 11
    drafts = Drafts((queries - 1,) * 3, offered) if queries > 1 else None
    rows = steps.rows(plan, drafts)
    step = steps.tensors(rows)
    assert step.layout.slot_T.tolist() == slots.tolist()
    caches = [LatentCache(layout, 20, torch.device("cuda")) for _ in range(2)]
    for cache in caches:
        filling = torch.Generator("cuda").manual_seed(0)
        cache.pages_LPBW.normal_(generator=filling)
    exchange = LocalExchange(ROUND.n_routed_experts)
    graphs = StepGraphs(
        Served.of(model, caches[0], Plugs(plain_linear, exchange)),
        (2, 4),
        queries,
        steps=steps,
        buffers=StepBuffers.blank(model, 4, queries, 8),
    )
    graphs.capture(iter)
    assert torch.equal(caches[0].pages_LPBW, caches[1].pages_LPBW), "capturing wrote to the cache"
    with torch.inference_mode():
        replayed = graphs.run(rows, graphs.size_of(rows))
        found, drawn = replayed.outputs, replayed.drawn
        sockets = Sockets(PagedAttend(caches[1], step.layout), exchange, plain_linear)
        hidden = model(step.tokens_T, step.positions_T, sockets).hidden_TD
        torch.testing.assert_close(found.hidden_TD, hidden, rtol=1e-4, atol=1e-4)
        logits_TV = model.logits(hidden, plain_linear)
        torch.testing.assert_close(found.logits_TV, logits_TV, rtol=1e-4, atol=1e-4)
    assert drawn.token_R.tolist() == logits_TV.argmax(-1).tolist()
    assert steps.fed_NF[:3, 0].tolist() == drawn.newest_S.tolist()
    torch.testing.assert_close(caches[0].pages_LPBW, caches[1].pages_LPBW, rtol=1e-4, atol=1e-4)


def in_error_mode(engine):
    """A step raises from now on where the host waits for the device, `Homeward.wait` excepted."""
    step = engine.step

    def checked():
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.step = checked


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("how", [{}, {"quantization": "fp8", "kv_cache_dtype": "fp8"}], ids=["wide", "fp8"])
def test_no_step_waits_for_the_device_before_its_tokens_come_home(eager, how):
    engine = small_engine(gpu_model(torch.bfloat16), enforce_eager=eager, num_blocks=64, **how)
    serve(engine, mixed_requests())  # kernels are compiled
    in_error_mode(engine)
    answers = serve(engine, mixed_requests())
    assert all(answer.finish in ("length", "stop") for answer in answers.values())


def test_a_wait_inside_a_step_would_be_caught():
    engine = small_engine(gpu_model())
    in_error_mode(engine)
    run = engine._runner.run

    def waiting(plan, drafts):
        result = run(plan, drafts)
        result.logits_SV.max().item()
        return result

    engine._runner.run = waiting
    engine.add(request("a", [3, 4, 5]))
    with pytest.raises(RuntimeError, match="synchronizing"):
        engine.step()


def first_logprobs(engine):
    asked = [request(str(i), p, prompt_logprobs=0) for i, p in enumerate(prompts(6, seed=4, shortest=30))]
    rows = [a.deltas[0].prompt_logprobs[1:] for a in serve(engine, asked).values()]
    return torch.tensor([row[0].logprob for each in rows for row in each])


@pytest.mark.parametrize(
    ("how", "bound"),
    [
        ({}, 0.05),
        ({"kv_cache_dtype": "fp8"}, 0.15),
        ({"quantization": "fp8"}, 0.3),
        ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, 0.3),
    ],
    ids=str,
)
def test_bfloat16_and_fp8_stay_near_float32_on_the_cpu(how, bound):
    budget = {"max_num_batched_tokens": 8}  # chunks read what the cache kept
    exact = first_logprobs(small_engine(random_model(ROUND), **budget))
    found = first_logprobs(small_engine(gpu_model(torch.bfloat16), **budget, **how))
    off = float((found - exact).abs().median())
    assert 0 < off < bound


def test_the_account_of_memory_adds_up_and_the_cache_keeps_to_it():
    engine = small_engine(
        gpu_model(torch.bfloat16), num_blocks=None, gpu_memory_utilization=0.3, max_num_batched_tokens=512
    )
    size, use = engine.parts.cache_size, engine.parts.memory
    cache = engine._runner.cache.num_bytes
    assert use is not None
    assert use.weights == sum(p.nbytes for p in engine._runner.model.parameters()) + sum(
        b.nbytes for b in engine._runner.model.buffers()
    )
    assert use.activations > 0
    free, total = torch.cuda.mem_get_info()
    assert use.in_use + use.reserve + cache <= 0.3 * total
    assert total - free <= 0.3 * total + (64 << 20)
    assert "for activations" in size.reason
    assert "latent cache" in " ".join(use.lines(0.3, cache))


@pytest.mark.parametrize("how", [{}, {"quantization": "fp8", "kv_cache_dtype": "fp8"}], ids=["wide", "fp8"])
def test_early_kernels_and_a_second_stream_change_no_token(how):
    fast = tokens(small_engine(gpu_model(torch.bfloat16), num_blocks=64, **how))
    engine = small_engine(gpu_model(torch.bfloat16), num_blocks=64, **how)
    with in_turn():
        for graphs in engine._runner.all_graphs:
            graphs.served = replace(graphs.served, plugs=replace(graphs.served.plugs, aside=at_once))
            graphs.capture(iter)
        assert tokens(engine) == fast
