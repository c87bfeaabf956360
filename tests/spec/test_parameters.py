"""The parameter table against published totals and against the shapes of released checkpoints."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from benthic.errors import UnknownFieldError
from benthic.spec import presets, totals
from benthic.spec.parameters import parameters

V3 = presets.get("deepseek-v3")
RELEASED = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight-16b-a3b", "kimi-k2")


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("deepseek-v3", 671_026_419_200),
        ("deepseek-r1", 671_026_419_200),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v2-lite", 15_706_484_224),
        ("moonlight-16b-a3b", 15_960_110_208),
        ("kimi-k2", 1_026_408_232_448),
    ],
)
def test_total_parameters_equal_the_published_checkpoints(name, total):
    assert totals.total(presets.get(name)) == total


@pytest.mark.parametrize(
    ("name", "body", "head", "both"),
    [
        ("deepseek-v3", 35.699, 36.626, 37.552),
        ("deepseek-v2", 20.327, 20.852, 21.376),
        ("deepseek-v2-lite", 2.242, 2.451, 2.661),
        ("moonlight-16b-a3b", 2.244, 2.579, 2.915),
        ("kimi-k2", 30.513, 31.687, 32.862),
    ],
)
def test_activated_parameters_follow_each_of_the_three_counting_rules(name, body, head, both):
    config = presets.get(name)
    assert round(totals.active(config, "body") / 1e9, 3) == body
    assert round(totals.active(config, "head") / 1e9, 3) == head
    assert round(totals.active(config, "embedding and head") / 1e9, 3) == both


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deepseek-v3", 187_107_328),
        ("deepseek-v2", 149_227_520),
        ("deepseek-v2-lite", 13_763_072),
        ("moonlight-16b-a3b", 13_763_072),
        ("kimi-k2", 101_124_096),
    ],
)
def test_mla_of_one_layer_has_the_published_size(name, count):
    table = parameters(presets.get(name))
    assert sum(p.numel for p in table if p.name.startswith("layers.0.attn.")) == count


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("deepseek-v3", 44_040_192),
        ("kimi-k2", 44_040_192),
        ("deepseek-v2", 23_592_960),
        ("deepseek-v2-lite", 8_650_752),
    ],
)
def test_one_expert_has_three_matrices(name, expert):
    config = presets.get(name)
    sizes = {p.name: p.numel for p in parameters(config)}
    routed = sizes["layers.5.moe.experts.gate_up"] + sizes["layers.5.moe.experts.down"]
    assert routed == config.n_routed_experts * expert
    shared = sizes["layers.5.moe.shared.gate_up.weight"] + sizes["layers.5.moe.shared.down.weight"]
    assert shared == config.n_shared_experts * expert


def test_v3_layers_and_tables_have_the_published_sizes():
    table = parameters(V3)
    assert sum(p.numel for p in table if p.name.startswith("layers.0.mlp.")) == 396_361_728
    assert sum(p.numel for p in table if p.name.startswith("layers.3.")) == 11_507_286_272
    sizes = {p.name: p.numel for p in table}
    assert sizes["embed.weight"] == sizes["head.weight"] == 926_679_040


def test_v3_mtp_layer_is_counted_stored_and_unique():
    assert totals.mtp_stored(V3) == 13_463_426_304
    assert totals.mtp_unique(V3) == 11_610_068_224
    assert totals.stored(V3) == 684_489_845_504


def test_v3_checkpoint_has_the_published_bytes_and_tensors():
    assert totals.checkpoint_bytes(V3, fp8=True) == 688_574_839_360
    tensors = totals.checkpoint_tensors(V3)
    scales = sum(t.precision == "fp8" for t in tensors)
    assert len(tensors) + scales == 91_991
    assert totals.scale_shape((576, 7168)) == (5, 56)


def test_routed_experts_of_v3_are_653_909_million():
    routed = sum(p.numel for p in parameters(V3, include_mtp=False) if p.part == "routed experts")
    assert round(routed / 1e9, 3) == 653.909


@pytest.mark.parametrize("name", presets.names())
def test_every_checkpoint_tensor_is_named_once_and_fits_its_parameter(name):
    table = parameters(presets.get(name))
    assert len({p.name for p in table}) == len(table)
    tensors = [t for p in table for t in p.hf]
    assert len({t.name for t in tensors}) == len(tensors)
    for p in table:
        assert len(p.axes) == len(p.shape)
        assert sum(t.numel for t in p.hf if not t.duplicate) == p.numel
        for t in p.hf:
            assert t.shape == p.shape[len(t.index) :]
            assert all(i < size for i, size in zip(t.index, p.shape, strict=False))


@pytest.mark.parametrize("name", presets.names())
def test_rope_rows_are_the_last_rows_of_every_query_head_and_of_the_latent(name):
    config = presets.get(name)
    rope, head = config.qk_rope_head_dim, config.qk_head_dim
    for p in parameters(config):
        leaf = p.name.rsplit(".", 2)[-2]
        if leaf == "kv_a":
            assert p.rope_rows == ((config.kv_lora_rank, config.kv_lora_rank + rope),)
        elif leaf == ("q" if config.q_lora_rank is None else "q_b"):
            starts = [start for start, _ in p.rope_rows]
            assert starts == [h * head + config.qk_nope_head_dim for h in range(config.num_attention_heads)]
            assert all(stop - start == rope for start, stop in p.rope_rows)
        else:
            assert p.rope_rows == ()


def test_only_routed_experts_are_partly_active():
    for p in parameters(V3):
        expected = Fraction(8, 256) if p.part == "routed experts" else 1
        assert p.active == expected


def test_a_config_without_mtp_lists_no_copies():
    table = parameters(V3, include_mtp=False)
    assert not any(p.mtp for p in table)
    assert not any(t.duplicate for p in table for t in p.hf)
    assert len(parameters(V3)) > len(table)


def test_small_models_are_small():
    assert 3e6 <= totals.total(presets.get("tiny")) <= 10e6
    assert totals.stored(presets.get("nano")) <= 120_000
    assert math.prod((320, 32)) * 2 < totals.total(presets.get("nano")) <= 100_000


def test_an_unknown_model_is_named_with_its_nearest_neighbour():
    with pytest.raises(UnknownFieldError, match=r"'deepseek-v33'.*'deepseek-v3'"):
        presets.get("deepseek-v33")
    assert presets.get("DeepSeek-V3") is V3
