"""Weights that stay in FP8: the socket, the loader, and how far from wide weights the network ends up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_models import BASE, furthest, packed, random_model

from benthic.errors import CheckpointError
from benthic.kernels import ops
from benthic.kernels.ops import Fp8
from benthic.model.block_scaled import (
    WIDENED,
    block_scaled_linear,
    load_block_scaled,
    narrow,
    side_by_side,
    stored_in_fp8,
)
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.fp8_products import fp8_parameters
from benthic.model.local import packed_sockets, plain_linear
from benthic.model.narrow_rows import quantise_as_computed

# Gate and up end inside a block (48 rows) in the first, at its border in the second.
ODD = replace(BASE, num_nextn_predict_layers=0)
WHOLE = replace(ODD, intermediate_size=256, moe_intermediate_size=128)


def logits(model, linear=None):
    tokens_T, positions_T, cu_seqlens, _ = packed(model.config, (5, 1, 9))
    more = {} if linear is None else {"linear": linear}
    sockets = packed_sockets(cu_seqlens, 9, n_routed_experts=model.config.n_routed_experts, **more)
    with torch.no_grad():
        hidden = model(tokens_T, positions_T, sockets).hidden_TD
        return model.logits(hidden, sockets.linear)


def dequantised(values, scale):
    parts = [
        ops.dequantise_fp8(v, s, dtype=torch.float32)
        for v, s in zip(
            values.reshape(-1, *values.shape[-2:]), scale.reshape(-1, *scale.shape[-2:]), strict=True
        )
    ]
    return torch.stack(parts).view(values.shape)


@pytest.mark.parametrize("config", [ODD, WHOLE], ids=["odd", "whole"])
def test_narrowed_weights_take_a_byte_each_and_are_near_what_they_were(config):
    model, wide = random_model(config), dict(random_model(config).named_parameters())
    scales = narrow(model)
    names = {name for name in fp8_parameters(random_model(config)) if not name.endswith(WIDENED)}
    assert set(scales) == names
    for name, param in model.named_parameters():
        if name in names:
            assert param.element_size() == 1
            assert furthest(dequantised(param.data, scales[name]), wide[name].detach()) < 0.04, name
        else:
            assert torch.equal(param, wide[name]), name


@pytest.mark.parametrize("config", [ODD, WHOLE], ids=["odd", "whole"])
def test_products_in_fp8_differ_from_dequantised_weights_by_the_rounding_of_rows_alone(config):
    model, twin = random_model(config), random_model(config)
    scales = narrow(model)
    state = dict(twin.named_parameters())
    for name, scale in scales.items():
        state[name].data = dequantised(dict(model.named_parameters())[name].data, scale)
    linear = block_scaled_linear(model, scales)
    generator = torch.Generator().manual_seed(0)
    for name in scales:
        narrowed, wide = dict(model.named_parameters())[name], state[name].detach()
        x = torch.randn(7, wide.shape[-1], generator=generator)
        if ".experts." in name:
            ends = torch.tensor([2, 2, 3, 3, 5, 6, 6, 6], dtype=torch.int32)
            if wide.dim() == 4:
                narrowed, wide = narrowed.flatten(1, 2), wide.flatten(1, 2)
            found, exact = linear.grouped(x, narrowed, ends), plain_linear.grouped(x, wide, ends)
            assert torch.equal(found[6], torch.zeros_like(found[6]))
        else:
            if wide.dim() == 3:
                narrowed, wide = narrowed.flatten(0, 1), wide.flatten(0, 1)
            found, exact = linear(x, narrowed), x @ wide.t()
        assert 1e-4 < furthest(found, exact) < 0.06, name


@pytest.mark.parametrize("config", [ODD, WHOLE], ids=["odd", "whole"])
def test_a_network_in_fp8_stays_near_float32(config):
    exact = logits(random_model(config))
    model = random_model(config)
    linear = block_scaled_linear(model, narrow(model))
    found = logits(model, linear)
    off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(off.median()) < 0.3  # a choice of experts that flips moves a row of so small a model by half
    assert float(off.median()) > 1e-4, "nothing was multiplied in FP8"


@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("config", [ODD, WHOLE], ids=["odd", "whole"])
def test_rows_quantised_as_they_are_computed_give_the_same_logits_to_the_bit(
    config, q_lora_rank, monkeypatch
):
    config = replace(config, q_lora_rank=q_lora_rank)
    model = random_model(config)
    scales = narrow(model)
    linear = block_scaled_linear(model, scales)
    for op in ("swiglu", "rms_norm", "add_rms_norm"):  # those in C differ from the definitions in a last bit
        reference = partial(getattr(ops, op), impl="reference")
        monkeypatch.setattr(ops, op, reference)
    exact = logits(model, linear)
    quantised = []
    monkeypatch.setattr(ops, "quantise_fp8_rows", noting(ops.quantise_fp8_rows, quantised))
    assert torch.equal(logits(model, linear), exact)
    before = len(quantised)
    linear = quantise_as_computed(model, scales)
    assert torch.equal(logits(model, linear), exact)
    assert len(linear.joined) == (0 if first_rows(config) % 128 else config.num_hidden_layers)
    saved = 5 if q_lora_rank else 4  # in a layer: rows of q, kv_a and q_b, and of the network those of two
    assert before - (len(quantised) - before) == saved * config.num_hidden_layers


def first_rows(config):
    return config.q_lora_rank or config.num_attention_heads * config.qk_head_dim


@pytest.mark.parametrize("q_lora_rank", [None, 256])
def test_latents_are_multiplied_with_queries_as_one_where_those_are_whole_blocks(q_lora_rank):
    config = replace(WHOLE, q_lora_rank=q_lora_rank, num_attention_heads=2, qk_nope_head_dim=112)
    config = replace(config, qk_rope_head_dim=16)
    model = random_model(config)
    scales = narrow(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = logits(model, block_scaled_linear(model, scales))
    linear = quantise_as_computed(model, scales)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert len(linear.joined) == config.num_hidden_layers
    found = logits(model, linear)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    attention = model.blocks[0].attn
    weights, x = (attention.first.weight, attention.kv_a.weight), torch.randn(7, config.hidden_size)
    for product, weight in zip(linear.together(x, weights), weights, strict=True):
        torch.testing.assert_close(product, linear(x, weight))
    assert linear.together(x, weights[::-1]) is None


def noting(function, seen):
    def call(*args, **kwargs):
        seen.append(args)
        return function(*args, **kwargs)

    return call


def test_the_widths_of_gate_and_up_decide_whether_they_share_a_product():
    whole = side_by_side(Fp8(torch.empty(4, 2, 256, 128), torch.empty(4, 2, 2, 1)))
    assert [part.values.shape for part in whole] == [(4, 512, 128)]
    assert [part.scale.shape for part in whole] == [(4, 4, 1)]
    odd = side_by_side(Fp8(torch.empty(4, 2, 48, 128), torch.empty(4, 2, 1, 1)))
    assert [part.values.shape for part in odd] == [(4, 48, 128)] * 2


@pytest.mark.parametrize("config", [ODD, WHOLE], ids=["odd", "whole"])
def test_a_block_scaled_checkpoint_is_loaded_as_it_is(tmp_path, config):
    save_pretrained(random_model(config), tmp_path, fp8=True)
    assert stored_in_fp8(tmp_path)
    model, scales = load_block_scaled(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    wide = load_pretrained(tmp_path, dtype=torch.float32, mtp=False).state_dict()
    narrowed = 0
    for name, tensor in model.state_dict().items():
        if name in scales:
            assert tensor.dtype == torch.float8_e4m3fn
            assert torch.equal(dequantised(tensor, scales[name]), wide[name]), name
            narrowed += tensor.numel()
        else:
            assert torch.equal(tensor, wide[name]), name
    assert narrowed > 0.6 * sum(
        t.numel() for n, t in wide.items() if n.startswith("layers.") and "norm" not in n
    )
    found = logits(model, block_scaled_linear(model, scales))
    exact = logits(load_pretrained(tmp_path, dtype=torch.float32, mtp=False))
    off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(off.median()) < 0.3


def test_a_wide_checkpoint_is_not_taken_for_a_block_scaled_one(tmp_path):
    save_pretrained(random_model(ODD), tmp_path)
    assert not stored_in_fp8(tmp_path)


def test_rotary_rows_that_would_leave_their_block_are_refused(tmp_path):
    # 4 heads of 88 + 8 rows: the rotary rows of the second head, 184 to 191, are fine; those at 124 are not
    config = replace(ODD, qk_nope_head_dim=124, qk_rope_head_dim=8, q_lora_rank=None, num_attention_heads=2)
    save_pretrained(random_model(config), tmp_path, fp8=True)
    with pytest.raises(CheckpointError, match=r"rotary rows lie in another block of 128.*--quantization"):
        load_block_scaled(tmp_path, device=torch.device("cpu"))
