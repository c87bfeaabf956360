"""Kernels that start before the one ahead has ended give the bits of kernels that start in turn."""

from __future__ import annotations

import pytest
import torch

from benthic.kernels import ops
from benthic.kernels.launch import early, in_turn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

WIDTH, EXPERTS, TOP_K, HEADS = 512, 16, 4, 4
GATE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "top_k": TOP_K, "n_group": 4, "topk_group": 2}
GATE |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}


def random(*shape, dtype=torch.bfloat16, scale=0.1):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).mul_(scale).to(dtype)


class Layer:
    """What a decode step is made of but for attention and cuBLAS, in two layers that share their weights."""

    def __init__(self, rows, dtype=torch.bfloat16):
        torch.manual_seed(rows)
        self.x = random(rows, WIDTH, dtype=dtype, scale=1.0)
        self.norm, self.latent_norm = random(WIDTH, dtype=dtype), random(128, dtype=dtype)
        self.gate, self.bias = random(EXPERTS, WIDTH, dtype=dtype), random(EXPERTS, dtype=torch.float32)
        self.up, self.down = (
            random(EXPERTS, 2 * 256, WIDTH, dtype=dtype),
            random(EXPERTS, WIDTH, 256, dtype=dtype),
        )
        self.cos, self.sin = random(rows, 32, dtype=torch.float32), random(rows, 32, dtype=torch.float32)
        self.cache = torch.zeros(8, 64, 128 + 64, device="cuda", dtype=dtype)
        self.mix = random(WIDTH, WIDTH, dtype=dtype, scale=0.04)
        self.product = "few_rows" if rows <= 8 else "torch"
        self.slot = torch.randperm(8 * 64, device="cuda")[:rows]

    def block(self, x, gated):
        query, key = x.unflatten(1, (-1, 64))[:, :HEADS], x[:, HEADS * 64 : HEADS * 64 + 64]
        into = ops.Slots(self.cache, self.slot, alone=False)
        query, key, _ = ops.rope_norm_store(
            query, key, x[:, -128:], self.latent_norm, 1e-6, self.cos, self.sin, into
        )
        stored = self.cache.flatten(0, 1)[self.slot]  # a kernel of torch among ours
        normed, total = ops.add_rms_norm(torch.cat((query.flatten(1), stored, key), 1), x, self.norm, 1e-6)
        routing = ops.route(ops.gate_logits(normed, self.gate, impl="few_rows"), self.bias, **GATE)
        rows, ends, maps = ops.permute(normed, routing.expert_TK, EXPERTS)
        hidden = ops.grouped_swiglu(rows, self.up, ends, impl=gated)
        rows = ops.grouped_linear(hidden, self.down, ends, impl="few_rows")
        late = rows, maps, routing.weight_TK, (total, normed)
        summed = ops.unpermute(*late) if gated == "two_ops" else ops.unpermute_norm(*late, self.norm, 1e-6)[0]
        return ops.linear(summed, self.mix, impl=self.product)

    def run(self):
        return self.block(self.block(self.x, "few_rows"), "two_ops")

    def captured(self):
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.run()
        return graph, out


@pytest.mark.parametrize("rows", [1, 7, 64])
@torch.inference_mode()
def test_a_graph_of_early_kernels_gives_the_same_bits_over_two_hundred_inputs(rows):
    layer = Layer(rows)
    if not early(layer.x.device, rows)["PDL"]:
        pytest.skip("needs a Hopper GPU")
    fast, found = layer.captured()
    with in_turn():
        assert early(layer.x.device, rows) == {"PDL": False}
        slow, exact = layer.captured()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):  # replays follow one another closely, as those of a server do
        layer.x.copy_(random(rows, WIDTH, scale=1.0))
        for graph, out in ((fast, found), (slow, exact)):
            layer.cache.zero_()
            graph.replay()
            out_of = out.clone()
            if graph is fast:
                kept = out_of
        wrong += (kept != out_of).any()
    assert not int(wrong)
    assert bool(exact.isfinite().all())


@torch.inference_mode()
def test_early_kernels_on_two_streams_give_the_same_bits():
    layers = [Layer(rows) for rows in (5, 64)]
    with in_turn():
        exact = [layer.run().clone() for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(20):
        found = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer.run())
        torch.cuda.synchronize()
        assert all(torch.equal(mine, own) for mine, own in zip(found, exact, strict=True))


def apart(x):
    """A copy that does not begin at a multiple of 16 bytes."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("first", ["aligned", "apart"])
def test_remembered_launches_tell_addresses_and_sizes_apart(first):
    """Once each kind of tensor has been launched, the other still gets a kernel of its own."""
    for rows, width in ((64, 2048), (1, 2048), (64, 1), (65, 2048), (64, 2040)):
        x, weight = random(rows, width, scale=1.0), random(width, scale=1.0)
        operands = [(x, weight), (apart(x), apart(weight))]
        for mine, own in (operands if first == "aligned" else operands[::-1]) * 2:
            wanted = ops.rms_norm(x, weight, 1e-6, impl="reference")
            torch.testing.assert_close(ops.rms_norm(mine, own, 1e-6, impl="triton"), wanted)
    heads, second = random(64, 4, 128), random(64, 4, 64)
    for _ in range(2):
        for mine, own in ((heads, second), (heads[:1], second[:1]), (heads, second[:, 0])):
            wanted = ops.join_head_dims(mine, own, impl="reference")
            assert ops.join_head_dims(mine, own, impl="triton").equal(wanted)
