from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_models import BASE

from benthic.kernels import ops
from benthic.model.network import DeepSeek
from benthic.model.rope import Rotary, inverse_frequencies, magnitude, softmax_scale, yarn_bounds, yarn_mscale
from benthic.model.rope_layout import to_half_split, to_interleaved
from benthic.spec import presets
from benthic.spec.parameters import parameters


@pytest.mark.parametrize(
    ("name", "bounds"), [("deepseek-v3", (10, 23)), ("deepseek-v2", (10, 23)), ("kimi-k2", (19, 20))]
)
def test_yarn_bounds_of_released_models(name, bounds):
    config = presets.get(name)
    assert yarn_bounds(config, config.rope_scaling) == bounds


@pytest.mark.parametrize(
    ("name", "mscale", "scale"),
    [
        ("deepseek-v3", 1.368888, 0.1352338),
        ("deepseek-v2", 1.260804, 0.1147214),
        ("deepseek-v2-lite", 1.260804, 0.1147214),
        ("kimi-k2", 1.346574, 0.1308608),
    ],
)
def test_softmax_scale_of_released_models(name, mscale, scale):
    config = presets.get(name)
    assert yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) == pytest.approx(
        mscale, abs=1e-6
    )
    assert softmax_scale(config) == pytest.approx(scale, abs=1e-7)
    assert magnitude(config) == 1.0


def test_softmax_scale_without_yarn_is_the_inverse_root_of_the_head_dim():
    assert softmax_scale(presets.get("moonlight-16b-a3b")) == pytest.approx(192**-0.5)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_passes_between_linearly():
    config = presets.get("deepseek-v3")
    extended = inverse_frequencies(config)
    plain = inverse_frequencies(replace(config, rope_scaling=None))
    ratios = [after / before for after, before in zip(extended, plain, strict=True)]
    assert ratios[:11] == [1.0] * 11
    assert ratios[23:] == pytest.approx([1 / 40] * 9)
    ramp = (15 - 10) / (23 - 10)
    assert ratios[15] == pytest.approx(1 - ramp + ramp / 40)
    assert plain[1] == pytest.approx(10000 ** (-2 / 64))


def test_angles_stay_float32_when_the_model_is_cast_or_emptied():
    model = DeepSeek(BASE)
    expected = model.rotary.frequency_r2.clone()
    model.bfloat16()
    assert model.rotary.frequency_r2.dtype == torch.float32
    model.to_empty(device="cpu")
    assert torch.equal(model.rotary.frequency_r2, expected)
    assert "rotary.frequency_r2" not in model.state_dict()


def test_angles_of_far_positions_are_exact_to_float32():
    rotary = Rotary(presets.get("deepseek-v3"))
    position = 163_839
    cos = rotary(torch.tensor([position])).cos_Tr2[0]
    exact = [math.cos(position * float(f)) for f in rotary.frequency_r2]
    # The product position * frequency is rounded to float32: up to half a unit in the last place of 1.6e5.
    assert cos.tolist() == pytest.approx(exact, abs=1e-2)
    assert cos[20:].tolist() == pytest.approx(exact[20:], abs=1e-5)


def test_half_split_rotation_of_permuted_rows_equals_interleaved_rotation():
    """The reference code rotates (x0, x1), (x2, x3), … as complex numbers."""
    param = next(p for p in parameters(BASE) if p.name == "layers.0.attn.q_b.weight")
    heads, nope, rope = BASE.num_attention_heads, BASE.qk_nope_head_dim, BASE.qk_rope_head_dim
    weight_OI = torch.randn(param.shape, dtype=torch.float64)
    x_TI = torch.randn(4, param.shape[1], dtype=torch.float64)
    angle_Tr2 = torch.randn(4, rope // 2, dtype=torch.float64)

    interleaved_THr = (x_TI @ weight_OI.T).view(4, heads, -1)[..., nope:]
    pairs = torch.view_as_complex(interleaved_THr.reshape(4, heads, rope // 2, 2).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle_Tr2), angle_Tr2)[:, None]

    split_THr = (x_TI @ to_half_split(weight_OI, param).T).view(4, heads, -1)[..., nope:]
    ours = ops.rope(split_THr.contiguous(), angle_Tr2.cos(), angle_Tr2.sin())
    torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), dim=-1))


def test_nope_rows_stay_and_interleaving_undoes_splitting():
    for param in parameters(BASE):
        if not param.rope_rows:
            continue
        weight_OI = torch.randn(param.shape)
        split = to_half_split(weight_OI, param)
        assert torch.equal(to_interleaved(split, param), weight_OI)
        assert not torch.equal(split, weight_OI)
        first = param.rope_rows[0][0]
        assert torch.equal(split[:first], weight_OI[:first])
