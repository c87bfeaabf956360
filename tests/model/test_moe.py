from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import BASE, VARIANTS, packed, random_model
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.model.block import Attended
from benthic.model.local import LocalExchange, PackedAttend, PlainLinear, plain_linear
from benthic.model.moe import Gate
from benthic.model.sockets import Sockets

SPARSE = [name for name, config in VARIANTS.items() if config.n_routed_experts]


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def literal_routing(config, weight_ED, bias_E, u_D):
    """DeepSeek-V3 report eq. (13)-(16) and section 2.1.2 for one token; softmax as in DeepSeek-V2."""
    logits = [float(u_D @ e_D) for e_D in weight_ED]
    scores = torch.tensor(logits, dtype=torch.float64)
    s = torch.sigmoid(scores) if config.scoring_func == "sigmoid" else torch.softmax(scores, 0)
    chooser = s if bias_E is None else s + bias_E
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    best = 2 if config.topk_method == "noaux_tc" else 1
    value = [sum(sorted((float(chooser[i]) for i in group), reverse=True)[:best]) for group in groups]
    kept = sorted(range(config.n_group), key=lambda g: -value[g])[: config.topk_group]
    allowed = [i for g in kept for i in groups[g]] if config.n_group > 1 else range(config.n_routed_experts)
    chosen = sorted(allowed, key=lambda i: -float(chooser[i]))[: config.num_experts_per_tok]
    weights = torch.stack([s[i] for i in chosen])
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return s, chosen, weights * config.routed_scaling_factor


@pytest.mark.parametrize("name", SPARSE)
def test_gate_chooses_and_weighs_as_the_report_says(name):
    config = VARIANTS[name]
    gate = random_model(config, dtype=torch.float64).blocks[-1].moe.gate
    x_TD = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    routing = gate(x_TD)
    assert routing.scores_TE.dtype == routing.weight_TK.dtype == torch.float32
    for t, u_D in enumerate(x_TD):
        s, chosen, weights = literal_routing(config, gate.weight.detach(), gate.bias, u_D)
        torch.testing.assert_close(routing.scores_TE[t].double(), s, atol=1e-6, rtol=1e-5)
        ours = dict(zip(routing.expert_TK[t].tolist(), routing.weight_TK[t].tolist(), strict=True))
        assert sorted(ours) == sorted(chosen)
        for expert, weight in zip(chosen, weights.tolist(), strict=True):
            assert ours[expert] == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_mixture_layer_equals_a_loop_over_experts(name):
    """Eq. (12): `h' = u + sum shared(u) + sum g_i FFN_i(u)`, expert by expert and token by token."""
    config = VARIANTS[name]
    block = random_model(config, dtype=torch.float64).blocks[-1]
    tokens_T, _, _, sockets = packed(config)
    generator = torch.Generator().manual_seed(6)
    shape = (len(tokens_T), config.hidden_size)
    residual_TD = torch.randn(shape, generator=generator, dtype=torch.float64)
    u_TD = torch.randn(shape, generator=generator, dtype=torch.float64)

    sent = block.dispatch(Attended(residual_TD, u_TD), sockets)
    actual_TD = block.combine(block.experts(sent, sockets), sockets)

    moe = block.moe
    expected_TD = residual_TD.clone()
    for t in range(len(u_TD)):
        for expert, weight in zip(sent.routing.expert_TK[t], sent.routing.weight_TK[t], strict=True):
            gate, up = moe.experts.gate_up[expert]
            expected_TD[t] += weight * swiglu(u_TD[t], gate, up, moe.experts.down[expert])
        if moe.shared is not None:
            gate, up = moe.shared.gate_up.weight
            expected_TD[t] += swiglu(u_TD[t], gate, up, moe.shared.down.weight)
    torch.testing.assert_close(actual_TD, expected_TD, atol=1e-9, rtol=1e-6)


def test_rows_that_stay_here_are_summed_before_combine_when_gradients_are_recorded_and_to_the_same_bits():
    exchange = LocalExchange(BASE.n_routed_experts)
    generator = torch.Generator().manual_seed(8)
    x_TD, *beside = (torch.randn(9, 16, generator=generator).bfloat16() for _ in range(3))
    scores_TE = torch.rand(9, BASE.n_routed_experts, generator=generator)
    weight_TK, expert_TK = scores_TE.topk(3)
    arrived = exchange.finish_dispatch(exchange.start_dispatch(x_TD, expert_TK.int(), weight_TK))
    recorded = exchange.start_combine(arrived.rows_RD, arrived, tuple(beside))
    assert len(recorded.tensors) == 1, "one tensor waits for combine"
    with torch.no_grad():
        apart = exchange.start_combine(arrived.rows_RD, arrived)
        expected_TD = ops.added(exchange.finish_combine(apart), tuple(beside))
        flight = exchange.start_combine(arrived.rows_RD, arrived, tuple(beside))
        assert torch.equal(exchange.finish_combine(flight), expected_TD)
    assert torch.equal(exchange.finish_combine(recorded), expected_TD)


def test_bias_steers_the_choice_and_not_the_weights():
    gate = random_model(BASE).blocks[-1].moe.gate
    x_TD = torch.randn(20, BASE.hidden_size, generator=torch.Generator().manual_seed(7))
    gate.bias.zero_()
    gate.bias[5] = 10.0
    routing = gate(x_TD)
    assert (routing.expert_TK == 5).any(dim=1).all()
    chosen = routing.scores_TE.gather(1, routing.expert_TK.long())
    expected = chosen / chosen.sum(-1, keepdim=True) * BASE.routed_scaling_factor
    torch.testing.assert_close(routing.weight_TK, expected)
    routing.weight_TK.sum().backward()
    assert not gate.bias.requires_grad


def test_experts_of_masked_groups_lose_even_when_all_biases_are_negative():
    config = replace(BASE, n_group=4, topk_group=2, num_experts_per_tok=4)
    gate = Gate(config)
    with torch.no_grad():
        gate.weight.zero_()  # every score is 0.5
        gate.bias.copy_(torch.tensor([-0.9, -0.9, -0.6, -0.6, -0.95, -0.95, -0.7, -0.7]))
    expert_TK = gate(torch.ones(1, config.hidden_size)).expert_TK
    assert sorted(expert_TK[0].tolist()) == [2, 3, 6, 7]


def test_gate_works_in_float32_and_its_bias_survives_a_cast():
    model = random_model(BASE)
    gate = model.blocks[-1].moe.gate
    before = gate.bias.clone()
    model.bfloat16()
    assert gate.weight.dtype == torch.bfloat16
    assert gate.bias.dtype == torch.float32
    assert torch.equal(gate.bias, before)
    x_TD = torch.randn(4, BASE.hidden_size).bfloat16()
    expected = torch.sigmoid(x_TD.float() @ gate.weight.float().T)
    torch.testing.assert_close(gate(x_TD).scores_TE, expected, atol=1e-6, rtol=1e-6)


def test_emptied_model_keeps_a_float32_bias_even_from_the_meta_device():
    with torch.device("meta"):
        gate = Gate(BASE)
    gate.bfloat16().to_empty(device="cpu")
    assert gate.bias.dtype == torch.float32
    assert gate.bias.device.type == "cpu"


class CountingLinear(PlainLinear):
    def __init__(self):
        self.single, self.group = 0, 0

    def __call__(self, x, weight):
        self.single += 1
        return plain_linear(x, weight)

    def grouped(self, rows_RI, weight_EOI, ends_E):
        self.group += 1
        return plain_linear.grouped(rows_RI, weight_EOI, ends_E)


def test_every_matrix_product_but_the_gates_goes_through_the_linear_socket():
    model = random_model(BASE)
    tokens_T, positions_T, cu_seqlens, _ = packed(BASE)
    linear = CountingLinear()
    sockets = Sockets(PackedAttend(cu_seqlens, 9), LocalExchange(BASE.n_routed_experts), linear)
    model.logits(model(tokens_T, positions_T, sockets).hidden_TD, linear)
    attention, dense, shared, head = 5, 2, 2, 1
    assert linear.single == 3 * attention + dense + 2 * shared + head
    assert linear.group == 2 * 2
