"""The same network on a GPU: nothing in it may stay behind on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import BASE, VARIANTS, furthest, packed, random_model

from benthic.model.block_scaled import block_scaled_linear, narrow
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.initialise import initialise
from benthic.model.local import packed_sockets, plain_linear
from benthic.model.narrow_rows import quantise_as_computed
from benthic.model.network import DeepSeek

pytestmark = pytest.mark.gpu

# Sizes that GPU kernels take: head dims and widths are multiples of 16.
ROUND = replace(
    BASE,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    initializer_range=0.08,
    num_nextn_predict_layers=1,
)


def on_gpu(config, lengths=(5, 1, 9)):
    tokens_T, positions_T, cu_seqlens, _ = packed(config, lengths)
    sockets = packed_sockets(cu_seqlens.cuda(), max(lengths), n_routed_experts=config.n_routed_experts)
    return tokens_T.cuda(), positions_T.cuda(), sockets


def logits_of(model, tokens_T, positions_T, sockets):
    hidden = model(tokens_T, positions_T, sockets)
    if not model.config.num_nextn_predict_layers:
        return model.logits(hidden.hidden_TD, plain_linear)
    ahead = model.predict_ahead(0, model.mtp_input(hidden), tokens_T, positions_T, sockets)
    return torch.cat([model.logits(state.hidden_TD, plain_linear) for state in (hidden, ahead)])


@pytest.mark.parametrize("name", ["round", *VARIANTS])
def test_float32_logits_and_gradients_equal_those_on_the_cpu(name):
    config = ROUND if name == "round" else VARIANTS[name]
    here, there = random_model(config), random_model(config).cuda()
    tokens_T, positions_T, _, sockets = packed(config)
    expected = logits_of(here, tokens_T, positions_T, sockets)
    actual = logits_of(there, *on_gpu(config))
    assert furthest(actual.detach().cpu(), expected.detach()) < 1e-4
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * direction).sum().backward()
    (actual * direction.cuda()).sum().backward()
    wanted = dict(here.named_parameters())
    for key, parameter in there.named_parameters():
        assert furthest(parameter.grad.cpu(), wanted[key].grad) < 1e-3, key


def test_bfloat16_model_stays_near_float32_in_training_and_inference():
    model = random_model(ROUND).cuda().bfloat16()
    wide = random_model(ROUND).cuda()
    operands = on_gpu(ROUND, (70, 33, 1, 128))
    with torch.no_grad():
        expected = logits_of(wide, *operands)
    actual = logits_of(model, *operands)
    off = (actual.detach().float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(off.median()) < 0.05
    actual.float().square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_checkpoint_loads_straight_onto_the_gpu_and_dequantises_there(tmp_path):
    save_pretrained(random_model(ROUND).cuda(), tmp_path, fp8=True)
    there, here = load_pretrained(tmp_path, device="cuda"), load_pretrained(tmp_path)
    state = here.state_dict()
    for key, tensor in there.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), state[key]), key
    assert there.rotary.frequency_r2.device.type == "cuda"
    with torch.no_grad():
        assert logits_of(there, *on_gpu(ROUND)).isfinite().all()


def test_weights_initialised_on_the_gpu_are_those_of_the_cpu():
    here = DeepSeek(ROUND)
    with torch.device("cuda"):
        there = DeepSeek(ROUND)
    initialise(here, 3)
    initialise(there, 3)
    state = here.state_dict()
    for key, tensor in there.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), state[key]), key


@pytest.mark.parametrize("q_lora_rank", [None, 128])
def test_fp8_rows_quantised_as_they_are_computed_give_the_same_bits(q_lora_rank):
    config = replace(ROUND, q_lora_rank=q_lora_rank)
    model = random_model(config).to("cuda", torch.bfloat16)
    scales = narrow(model)
    tokens_T, positions_T, sockets = on_gpu(config, (50, 1, 9))
    sockets = replace(sockets, linear=block_scaled_linear(model, scales))
    with torch.no_grad():
        exact = model(tokens_T, positions_T, sockets).hidden_TD
        linear = quantise_as_computed(model, scales)
        apart = replace(sockets, linear=replace(linear, joined={}))
        assert torch.equal(model(tokens_T, positions_T, apart).hidden_TD, exact)
        assert len(linear.joined) == config.num_hidden_layers
        found = model(tokens_T, positions_T, replace(sockets, linear=linear)).hidden_TD
        assert float((found - exact).norm() / exact.norm()) < 0.02
