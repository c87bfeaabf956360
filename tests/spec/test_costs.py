"""FLOPs, KV bytes and training memory against published and hand-worked numbers."""

from __future__ import annotations

import pytest

from benthic.errors import BackendError, ConfigError, UnknownFieldError
from benthic.spec import flops, hardware, kv, memory, presets

V3 = presets.get("deepseek-v3")


def test_training_v3_at_4k_takes_250_gflop_a_token():
    assert round(flops.training(V3, 4096).value / 1e9, 2) == 250.46
    assert round(flops.training(V3, 4096, causal=False).value / 1e9, 2) == 281.16


def test_v2_is_near_its_published_155_gflop():
    assert flops.training(presets.get("deepseek-v2"), 4096).value / 1e9 == pytest.approx(155, rel=0.01)


def test_mtp_adds_about_ten_gflop_to_v3():
    extra = flops.training(V3, 4096, mtp=True).value - flops.training(V3, 4096).value
    assert 9e9 < extra < 17e9
    none = presets.get("kimi-k2")
    assert flops.training(none, 4096, mtp=True).value == flops.training(none, 4096).value


def test_one_query_and_key_cost_640_flops_a_head_expanded_and_2176_absorbed():
    assert flops.pair_flops(V3, "expanded") == 128 * 640
    assert flops.pair_flops(V3, "absorbed") == 128 * 2176


def test_prefill_is_the_forward_third_without_the_head():
    length = 4096
    got = flops.prefill(V3, length).value
    brute = sum(61 * 128 * 640 * (i + 1) for i in range(length)) / length
    assert got == pytest.approx(2 * 35_698_939_392 + brute, rel=1e-12)


def test_decode_grows_with_the_context_at_the_rate_of_its_form():
    for form, pair in (("absorbed", 2176), ("expanded", 640)):
        grown = flops.decode(V3, 1001, form).value - flops.decode(V3, 1000, form).value
        assert grown == 61 * 128 * pair
    assert flops.decode(V3, 1, "expanded").value == 2 * 36_625_618_432 + 61 * 128 * 640


@pytest.mark.parametrize("bad", [0, -4096])
def test_no_flops_per_token_without_tokens(bad):
    with pytest.raises(ConfigError, match=f"= {bad}"):
        flops.training(V3, bad)


def test_the_attention_layer_of_the_seeds_is_two_to_the_48():
    layer = flops.attention_layer(1024, 4096, 32, 128)
    assert layer.value == 281_474_976_710_656 == 2**48
    assert flops.attention_layer(1024, 4096, 32, 128, causal=True).value == 2**47
    scores = flops.score_elements(1024, 4096, 32).value
    assert scores == 549_755_813_888
    assert 2 * scores == 2**40
    assert round(layer.value / 989.4e12, 4) == 0.2845
    assert round(layer.value / 1979e12, 4) == 0.1422
    assert round(layer.value / hardware.get("a100").bf16_flops, 3) == 0.902


def test_the_flash_attention_3_ablation_runs_at_661_tflops():
    work = flops.attention_layer(4, 8448, 16, 128).value
    assert round(work / 3.538e-3 / 1e12, 1) == 661.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepseek-v3", 70_272),
        ("deepseek-v2", 69_120),
        ("deepseek-v2-lite", 31_104),
        ("moonlight-16b-a3b", 31_104),
        ("kimi-k2", 70_272),
    ],
)
def test_latent_cache_bytes_a_token_are_the_published_ones(name, value):
    assert kv.mla(presets.get(name)).value == value


def test_v3_would_cache_57_times_as_much_with_mha():
    assert kv.mla(V3, mtp=True).value == 71_424
    assert kv.expanded(V3).value == 4_997_120
    assert kv.mla_fp8(V3).value == 40_016
    assert kv.grouped(61, 128, 128).value == 3_997_696
    assert round(3_997_696 / kv.mla(V3).value, 1) == 56.9
    assert kv.grouped(61, 8, 128).value == 249_856
    assert kv.grouped(61, 1, 128).value == 31_232
    assert kv.equivalent_groups(V3) == 2.25


def test_kv_table_holds_the_known_models():
    values = {row.model: row.figure.value for row in kv.table(V3)}
    assert values["Qwen2.5-72B"] == values["Llama-3-70B"] == 327_680
    assert values["Llama-3.1-405B"] == 516_096
    assert values["OPT-13B"] == 819_200
    assert values["OPT-66B"] == 2_359_296
    assert values["OPT-175B"] == 4_718_592
    assert round(values["Qwen2.5-72B"] / 70_272, 2) == 4.66
    assert round(values["Llama-3.1-405B"] / 70_272, 2) == 7.34


def test_kv_table_leaves_out_more_groups_than_heads():
    kinds = [row.attention for row in kv.table(presets.get("tiny")) if row.model == "same dims"]
    assert kinds == ["MHA", "MQA"]


def test_training_keeps_16_13_or_11_bytes_a_parameter():
    assert [recipe.bytes for recipe in memory.RECIPES] == [16, 13, 11]
    assert memory.MIXED_16.total(10**9).value == 16e9
    assert memory.FP8_V3.total(10**9).value == 13e9
    assert round(memory.MIXED_16.total(671 * 10**9).value / 1e12, 2) == 10.74
    assert round(memory.FP8_V3.total(671 * 10**9).value / 1e12, 2) == 8.72


def test_zero_1_divides_master_weights_and_moments_only():
    assert memory.MIXED_16.on_each_rank(4).value == 4 + 12 / 4
    assert memory.FP8_V3.on_each_rank(128).value == 5 + 8 / 128
    assert memory.FP8_V3.on_each_rank().value == 13
    with pytest.raises(ConfigError, match="ranks = 0"):
        memory.FP8_V3.on_each_rank(0)


def test_ridge_points_are_the_known_ones():
    h100 = hardware.get("H100")
    assert round(h100.ridge()) == 295
    assert round(h100.ridge("fp8")) == 591
    assert round(hardware.get("a100").ridge()) == 153
    assert round(hardware.get("h200").ridge()) == 206
    with pytest.raises(BackendError, match="a100 has no FP8"):
        hardware.get("a100").ridge("fp8")


def test_h800_differs_from_h100_in_nvlink_alone():
    h100, h800 = hardware.get("h100"), hardware.get("h800")
    assert h800.nvlink_bandwidth == 200e9
    assert h800.nvlink_achieved == 160e9
    same = ("bf16_flops", "fp8_flops", "hbm_bytes", "hbm_bandwidth", "network_bandwidth", "sms")
    assert all(getattr(h100, field) == getattr(h800, field) for field in same)


def test_an_unknown_gpu_is_named_with_its_nearest_neighbour():
    with pytest.raises(UnknownFieldError, match="'h100'"):
        hardware.get("h1000")


def test_every_figure_says_its_rule_and_source():
    figures = [
        flops.training(V3, 4096),
        flops.prefill(V3, 1),
        flops.decode(V3, 1),
        kv.mla(V3),
        kv.mla_fp8(V3),
    ]
    figures += [row.figure for row in kv.table(V3)] + [r.total(1) for r in memory.RECIPES]
    assert all(f.rule and f.source for f in figures)


def test_masked_pairs_are_no_work():
    whole, none = flops.training(V3, 4096), flops.training(V3, 4096, kept_pairs=1e-9)
    half = flops.training(V3, 4096, kept_pairs=0.5)
    assert half.value == pytest.approx((whole.value + none.value) / 2)
    assert half.rule.endswith("s/2 x 0.5")
    assert "x" not in whole.rule.rpartition("s")[2]
