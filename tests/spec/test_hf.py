"""config.json comes in and goes out without loss, and contradictory files are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benthic.errors import ConfigError
from benthic.spec import presets
from benthic.spec.hf import HFConfig, dumps, from_hf, read, to_hf
from benthic.spec.model import Yarn

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "configs").glob("*.json"))
V3 = json.loads((Path(__file__).parents[1] / "golden" / "configs" / "deepseek-v3.json").read_text())


def modern(file: dict) -> dict:
    """The same file as transformers 5 writes it: `rope_parameters`, `dtype`, derived head dims."""
    new = {k: v for k, v in file.items() if k not in {"rope_scaling", "rope_theta", "torch_dtype"}}
    rope = dict(file.get("rope_scaling") or {})
    kind = rope.get("type", "default")
    new["rope_parameters"] = {**rope, "rope_theta": float(file["rope_theta"]), "rope_type": kind}
    return new | {"dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192, "pad_token_id": None}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("form", ["released", "modern"])
def test_a_released_file_is_read_as_the_preset_and_written_back_unchanged(path, form):
    file = json.loads(path.read_text())
    if form == "modern":
        file = modern(file)
    hf = from_hf(file, name=path.stem)
    assert hf.config == replace(presets.get(path.stem), initializer_range=0.02)
    assert list(to_hf(hf).items()) == list(file.items())


def test_there_are_five_golden_files():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_survives_the_way_through_config_json(name):
    config = presets.get(name)
    assert from_hf(json.loads(dumps(config)), name=config.name).config == config


def test_what_config_json_cannot_say_natively_is_said_only_when_needed():
    config = replace(presets.get("nano"), mtp_hidden="post_norm", rope_interleave=False)
    file = to_hf(config)
    assert file["mtp_hidden"] == "post_norm"
    assert "mtp_hidden" not in to_hf(presets.get("nano"))
    assert from_hf(file, name="nano").config == config


def test_a_changed_config_changes_only_its_own_fields():
    hf = from_hf(V3)
    file = to_hf(replace(hf, config=replace(hf.config, num_attention_heads=64, num_hidden_layers=4)))
    changed = {key for key in V3 if file[key] != V3[key]}
    assert changed == {"num_attention_heads", "num_key_value_heads", "num_hidden_layers"}
    assert list(file) == list(V3)


@pytest.mark.parametrize("form", [dict, modern])
def test_a_changed_rope_is_written_in_the_form_of_the_file(form):
    file = form(V3)
    hf = from_hf(file)
    longer = replace(hf.config, rope_scaling=Yarn(factor=64.0))
    again = to_hf(replace(hf, config=longer))
    assert from_hf(again).config == longer
    assert ("rope_parameters" in again) == (form is modern)


def test_yarn_without_mscale_all_dim_leaves_the_softmax_scale_alone():
    rope = {k: v for k, v in V3["rope_scaling"].items() if not k.startswith("mscale")}
    config = from_hf(V3 | {"rope_scaling": rope}).config
    assert config.softmax_scale == pytest.approx(192**-0.5)
    assert config.rope_scaling.rotary_factor == pytest.approx(1.368888, abs=1e-6)


def test_v2_files_say_less_and_mean_softmax():
    file = {k: v for k, v in V3.items() if k not in {"scoring_func", "topk_method"}}
    v2 = file | {"model_type": "deepseek_v2", "n_group": None, "topk_group": None}
    config = from_hf(v2).config
    assert (config.scoring_func, config.topk_method, config.n_group) == ("softmax", "greedy", 1)
    assert from_hf(file).config.topk_method == "noaux_tc"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hiden_size": 7168}, ["'hiden_size'", "Did you mean 'hidden_size'?"]),
        ({"index_topk": 2048}, ["'index_topk'"]),
        ({"model_type": "llama"}, ["'llama'", "deepseek_v3"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads = 8", "num_attention_heads", "128"]),
        ({"head_dim": 128}, ["head_dim = 128", "64"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq = 2"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"attention_dropout": 0.1}, ["attention_dropout = 0.1"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ({"n_group": 7}, ["n_routed_experts = 256", "n_group = 7"]),
        ({"hidden_size": "7168"}, ["hidden_size = '7168'"]),
        ({"eos_token_id": [1, 2]}, ["eos_token_id = [1, 2]"]),
        ({"rope_theta": "big"}, ["rope_theta = 'big'"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling = 'yarn'"]),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, ["linear", "only yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor and original_max_position_embeddings"]),
        ({"rope_scaling": {"factor": 4}}, ["rope_scaling has no type"]),
        ({"rope_scaling": V3["rope_scaling"] | {"betafast": 1}}, ["rope_scaling.betafast", "beta_fast"]),
        ({"rope_scaling": V3["rope_scaling"] | {"factor": 0.5}}, ["rope_scaling", "factor = 0.5"]),
        ({"rope_scaling": V3["rope_scaling"] | {"rope_theta": 5e4}}, ["50000.0", "10000"]),
        ({"rope_parameters": {"rope_type": "default"}}, ["contradicts rope_parameters"]),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_field_and_value(change, words):
    with pytest.raises(ConfigError) as caught:
        from_hf(V3 | change)
    for word in words:
        assert word in str(caught.value)


def test_missing_fields_are_all_named():
    with pytest.raises(ConfigError) as caught:
        from_hf({k: v for k, v in V3.items() if k not in {"n_group", "kv_lora_rank", "eos_token_id"}})
    assert all(
        f"{key} is missing" in str(caught.value) for key in ("n_group", "kv_lora_rank", "eos_token_id")
    )


def test_unknown_missing_and_contradictory_fields_are_reported_together():
    file = {k: v for k, v in V3.items() if k != "v_head_dim"} | {"moe_layer_freq": 2, "foo": 1}
    with pytest.raises(ConfigError) as caught:
        from_hf(file)
    assert all(word in str(caught.value) for word in ("'foo'", "v_head_dim is missing", "moe_layer_freq = 2"))


def test_a_folder_is_read_and_named(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(dumps(presets.get("tiny"), fp8=True))
    hf = read(folder)
    assert hf.config == replace(presets.get("tiny"), name="my-model")
    assert hf.file["quantization_config"]["weight_block_size"] == [128, 128]
    assert isinstance(read(folder / "config.json"), HFConfig)


@pytest.mark.parametrize("contents", ["{", "[]", "\x00"])
def test_a_file_that_is_no_config_is_refused(tmp_path, contents):
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read(tmp_path / "elsewhere")


@pytest.mark.hf
@pytest.mark.parametrize(
    "name", ["nano", "tiny", "deepseek-v3", "kimi-k2", "deepseek-v2", "deepseek-v2-lite"]
)
def test_transformers_loads_what_we_write_and_we_read_what_it_writes(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = presets.get(name)
    (tmp_path / "config.json").write_text(dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == ("deepseek_v3" if config.scoring_func == "sigmoid" else "deepseek_v2")
    for field in (
        "hidden_size",
        "n_routed_experts",
        "q_lora_rank",
        "kv_lora_rank",
        "topk_method",
        "scoring_func",
    ):
        assert getattr(theirs, field) == getattr(config, field)
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    assert rope["rope_type"] == ("yarn" if config.rope_scaling else "default")
    theirs.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert replace(again.config, name=name) == config
    assert to_hf(again) == json.loads((tmp_path / "again" / "config.json").read_text())
