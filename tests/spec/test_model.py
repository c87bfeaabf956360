"""A model config refuses contradictions, and says all of them at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benthic.errors import ConfigError
from benthic.spec import presets
from benthic.spec.model import Yarn

NANO = presets.get("nano")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, ["hidden_size = 0"]),
        ({"n_shared_experts": -1}, ["n_shared_experts = -1"]),
        ({"q_lora_rank": 0}, ["q_lora_rank = 0"]),
        ({"qk_rope_head_dim": 5}, ["qk_rope_head_dim = 5", "pairs"]),
        ({"first_k_dense_replace": 4}, ["first_k_dense_replace = 4", "num_hidden_layers = 3"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "n_routed_experts = 8"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok = 0"]),
        ({"n_group": 3}, ["n_routed_experts = 8", "n_group = 3"]),
        ({"topk_group": 3}, ["topk_group = 3", "n_group = 2"]),
        ({"num_experts_per_tok": 5}, ["leave 4 to choose from", "num_experts_per_tok = 5"]),
        ({"n_group": 8, "topk_group": 4}, ["n_group = 8 leaves 1 expert a group"]),
        ({"scoring_func": "softmax"}, ["topk_method = 'noaux_tc'", "scoring_func = 'softmax'"]),
        ({"topk_method": "greedy", "scoring_func": "softmax"}, ["n_group = 2", "greedy"]),
        ({"topk_method": "best"}, ["topk_method = 'best'", "noaux_tc, greedy, group_limited_greedy"]),
        ({"n_routed_experts": 0}, ["n_shared_experts = 1", "n_routed_experts = 0"]),
        ({"rope_theta": 1.0}, ["rope_theta = 1.0"]),
        ({"eos_token_id": 320}, ["eos_token_id = 320", "vocab_size = 320"]),
        ({"hidden_size": "32"}, ["hidden_size = '32'", "a whole number"]),
        ({"hidden_size": 32.5}, ["hidden_size = 32.5", "a whole number"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers = True"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps = nan", "a finite number"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob = 1", "true or false"]),
        ({"rope_scaling": {"factor": 2}}, ["rope_scaling", "Yarn"]),
    ],
)
def test_each_contradiction_is_refused_with_its_fields_and_numbers(change, words):
    with pytest.raises(ConfigError) as caught:
        replace(NANO, **change)
    for word in words:
        assert word in str(caught.value)


def test_all_contradictions_of_one_config_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        replace(NANO, qk_rope_head_dim=5, n_group=3, eos_token_id=-1)
    message = str(caught.value)
    assert "in 3 places" in message
    assert all(name in message for name in ("qk_rope_head_dim = 5", "n_group = 3", "eos_token_id = -1"))


@pytest.mark.parametrize("change", [{"factor": 0.5}, {"factor": 2.0, "beta_fast": 0.5}, {"factor": "40"}])
def test_a_yarn_that_cannot_be_is_refused(change):
    with pytest.raises(ConfigError, match="rope_scaling"):
        Yarn(**change)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek-v3", 0.1352338),
        ("deepseek-v2", 0.1147214),
        ("kimi-k2", 0.1308608),
        ("moonlight-16b-a3b", 0.0721688),
    ],
)
def test_softmax_scale_carries_the_yarn_temperature(name, scale):
    config = presets.get(name)
    assert round(config.softmax_scale, 7) == scale
    assert config.rope_scaling is None or config.rope_scaling.rotary_factor == 1.0


def test_kimi_k2_0905_has_the_published_softmax_scale():
    config = replace(presets.get("kimi-k2"), rope_scaling=Yarn(factor=64.0, beta_fast=1.0, beta_slow=1.0))
    assert round(config.softmax_scale, 7) == 0.1446796


def test_odd_sizes_are_no_contradiction():
    odd = replace(
        NANO, num_attention_heads=7, n_routed_experts=5, n_group=1, num_experts_per_tok=3, hidden_size=33
    )
    assert odd.qk_head_dim == 12
    assert odd.latent_dim == 20


def test_a_model_without_experts_is_dense_throughout():
    dense = replace(NANO, n_routed_experts=0, n_shared_experts=0, first_k_dense_replace=0)
    assert not any(dense.is_moe(layer) for layer in range(4))
