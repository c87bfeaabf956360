"""On a GPU: a row has the bits it has alone, through every op of a batch-invariant step and every tiling."""

from __future__ import annotations

import itertools

import pytest
import torch

from benthic.kernels import ops
from benthic.serve.sample import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TOKENS = 1536
SIZES = (*range(1, 34), 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 384, 511, 512, 513, 1023, 1024, 1025)
HIDDEN, HEADS, LATENT, ROTARY, NOPE, EXPERTS, TOP_K, WIDTH = 2048, 16, 512, 64, 128, 64, 6, 1408
BLOCK, COLUMNS, SEQUENCES = 64, 32, 12
GATE = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "top_k": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
}


def random(*shape, seed=0, dtype=torch.bfloat16, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def chosen_experts(tokens=TOKENS):
    scores = random(tokens, EXPERTS, seed=3, dtype=torch.float32)
    return scores.topk(TOP_K).indices.to(torch.int32), scores.topk(TOP_K).values.sigmoid()


def linear(outer, dtype=None):
    x, weight = random(TOKENS, HIDDEN), random(outer, HIDDEN, seed=1, scale=0.02)
    return lambda rows: ops.linear_by_row(x[rows], weight, dtype=dtype)


def odd_linear():
    x, weight = random(TOKENS, 1001), random(77, 1001, seed=1, scale=0.02)
    return lambda rows: ops.linear_by_row(x[rows], weight)


def absorb_query():
    x, weight = random(TOKENS, HEADS, NOPE + ROTARY), random(HEADS, NOPE, LATENT, seed=1, scale=0.05)
    return lambda rows: ops.heads_linear_by_row(x[rows][..., :NOPE], weight.transpose(1, 2))


def absorb_value():
    x, weight = random(TOKENS, HEADS, LATENT), random(HEADS, NOPE, LATENT, seed=1, scale=0.05)
    return lambda rows: ops.heads_linear_by_row(x[rows], weight)


def experts():
    x, (expert_TK, weight_TK) = random(TOKENS, HIDDEN), chosen_experts()
    up, down = (
        random(EXPERTS, outer, inner, seed=i, scale=0.02)
        for i, (outer, inner) in enumerate(((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    )

    def run(rows):
        sent, ends, maps = ops.permute(x[rows], expert_TK[rows], EXPERTS)
        hidden = ops.swiglu(ops.grouped_linear_by_row(sent, up, ends))
        return ops.unpermute(ops.grouped_linear_by_row(hidden, down, ends), maps, weight_TK[rows])

    return run


def one_crowded_expert():
    x, weight = random(TOKENS, HIDDEN), random(3, 96, HIDDEN, seed=1, scale=0.02)

    def run(rows):
        ends = torch.tensor([0, len(rows), len(rows)], dtype=torch.int32, device="cuda")
        return ops.grouped_linear_by_row(x[rows], weight, ends)

    return run


def attention(heads=HEADS, dtype=torch.bfloat16):
    cache = random(SEQUENCES * COLUMNS, BLOCK, LATENT + ROTARY).to(dtype)
    table = torch.randperm(SEQUENCES * COLUMNS, device="cuda").view(SEQUENCES, COLUMNS).to(torch.int32)
    q_latent, q_rope = random(TOKENS, heads, LATENT, seed=1), random(TOKENS, heads, ROTARY, seed=2)
    sequence = torch.arange(TOKENS, device="cuda", dtype=torch.int32) % SEQUENCES
    context = (torch.arange(TOKENS, device="cuda") * 37 % (COLUMNS * BLOCK + 1)).to(torch.int32)

    def run(rows):
        longest = -(-int(context[rows].max()) // BLOCK)
        narrow = table[:, : max(longest, 1)].contiguous()
        queries = q_latent[rows], q_rope[rows]
        return ops.mla_by_row(*queries, cache, narrow, sequence[rows], context[rows], scale=0.07)

    return run


def norm():
    x, residual, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN, seed=1), random(HIDDEN, seed=2)
    return lambda rows: torch.cat(ops.add_rms_norm(x[rows], residual[rows], weight, 1e-6), dim=1)


def latent_norm():
    x, weight = random(TOKENS, LATENT + ROTARY), random(LATENT, seed=2)
    return lambda rows: ops.rms_norm(x[rows][:, :LATENT], weight, 1e-6)


def rotation():
    x, angle = random(TOKENS, HEADS, ROTARY), random(TOKENS, ROTARY // 2, seed=1, dtype=torch.float32)
    return lambda rows: ops.rope(x[rows], angle[rows].cos(), angle[rows].sin())


def routing():
    logits, bias = random(TOKENS, EXPERTS, dtype=torch.float32), random(EXPERTS, seed=1, dtype=torch.float32)

    def run(rows):
        found = ops.route(logits[rows], bias, **GATE)
        return torch.cat((found.expert_TK.float(), found.weight_TK), dim=1)

    return run


def log_probabilities():
    logits = random(TOKENS, 32768, dtype=torch.float32)
    token = torch.arange(TOKENS, device="cuda") * 7 % 32768

    def run(rows):
        found = measure(logits[rows], token[rows], 5)
        return torch.cat((found.logprob_L[:, None], found.best_value_LM, found.best_token_LM.float()), dim=1)

    return run


STEPS = {
    "kv_a": lambda: linear(576),
    "o": lambda: linear(2048),
    "gate_up of shared experts": lambda: linear(5632),
    "gate in float32": lambda: linear(EXPERTS, torch.float32),
    "odd widths": odd_linear,
    "absorbed queries": absorb_query,
    "absorbed values": absorb_value,
    "routed experts": experts,
    "one crowded expert": one_crowded_expert,
    "attention": attention,
    "attention of 40 heads": lambda: attention(40),
    "attention over an FP8 cache": lambda: attention(dtype=torch.float8_e4m3fn),
    "norm of a residual sum": norm,
    "norm of a latent": latent_norm,
    "rotation": rotation,
    "routing": routing,
    "log-probabilities": log_probabilities,
}


@pytest.mark.parametrize("step", STEPS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_every_batch(step):
    run = STEPS[step]()
    everything = run(torch.arange(TOKENS, device="cuda"))
    assert everything.isfinite().all()
    wrong = []
    for size in SIZES:
        rows = torch.randperm(TOKENS, device="cuda", generator=torch.Generator("cuda").manual_seed(size))[
            :size
        ]
        differ = (run(rows) != everything[rows]).flatten(1).any(1).sum().item()
        if differ:
            wrong.append((size, differ))
    assert not wrong, f"{step}: (batch size, rows that differ) {wrong}"


@pytest.mark.parametrize(
    "step", ["kv_a", "odd widths", "absorbed queries", "absorbed values", "routed experts"]
)
@torch.inference_mode()
def test_every_tiling_gives_the_same_bits(step, monkeypatch):
    from benthic.kernels import triton_by_row

    run, rows, first = STEPS[step](), torch.arange(300, device="cuda"), None
    for tiling, few_rows in itertools.product(triton_by_row.TILINGS, (0, 1000)):
        monkeypatch.setattr(triton_by_row, "tiles", lambda *_, tiling=tiling: tiling)
        monkeypatch.setattr(triton_by_row, "FEW_ROWS", few_rows)
        found = run(rows)
        first = found if first is None else first
        differ = (found != first).sum().item()
        assert not differ, f"{step}: {differ} of {found.numel()} numbers differ under {tiling}, {few_rows}"


@torch.inference_mode()
def test_a_graph_gives_the_bits_of_plain_calls_while_contexts_grow():
    cache, weight = random(40, BLOCK, LATENT + ROTARY), random(HEADS, NOPE, LATENT, seed=3, scale=0.05)
    table = torch.randperm(40, device="cuda")[:40].view(2, 20).to(torch.int32)
    sequence = torch.tensor([0, 1, 1, 1], dtype=torch.int32, device="cuda")
    context = torch.tensor([500, 700, 0, -1], dtype=torch.int32, device="cuda")
    queries = random(4, HEADS, LATENT, seed=1), random(4, HEADS, ROTARY, seed=2)

    def step(columns=20):
        pages = table[:, :columns].contiguous()
        seen = ops.mla_by_row(*queries, cache, pages, sequence, context, scale=0.07)
        return ops.heads_linear_by_row(seen, weight)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        context += 13
        graph.replay()
        assert torch.equal(captured, step())
        assert torch.equal(captured, step(columns=12))
