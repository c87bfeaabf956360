"""Weld: the module holds exactly the parameters of the table that checkpoints, sharder and planner read."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benthic.model.network import DeepSeek
from benthic.model.part import Part
from benthic.spec import presets
from benthic.spec.parameters import parameters
from benthic.spec.totals import mtp_unique, total

NAMES = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight-16b-a3b", "kimi-k2", "tiny", "nano")
PUBLISHED = {
    "deepseek-v3": 671_026_419_200,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "moonlight-16b-a3b": 15_960_110_208,
    "kimi-k2": 1_026_408_232_448,
}


def hollow(config, part=None) -> DeepSeek:
    with torch.device("meta"):
        return DeepSeek(config, part)


@pytest.mark.parametrize("name", NAMES)
def test_module_and_table_agree_on_every_name_and_shape(name):
    config = presets.get(name)
    table = {param.name: param.shape for param in parameters(config)}
    module = {key: tuple(tensor.shape) for key, tensor in hollow(config).state_dict().items()}
    assert module == table


@pytest.mark.parametrize("name", NAMES)
def test_module_trains_what_the_table_calls_trainable_and_keeps_the_rest_as_float32_buffers(name):
    config = presets.get(name)
    model = hollow(config)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {param.name for param in parameters(config) if param.trainable}
    for param in parameters(config):
        if not param.trainable:
            assert model.get_buffer(param.name).dtype == torch.float32


@pytest.mark.parametrize("name", PUBLISHED)
def test_module_has_as_many_elements_as_published(name):
    config = presets.get(name)
    held = {key: tensor.numel() for key, tensor in hollow(config).state_dict().items()}
    main = sum(numel for key, numel in held.items() if not key.startswith("mtp."))
    assert main == total(config) == PUBLISHED[name]
    assert sum(held.values()) - main == mtp_unique(config)


@pytest.mark.parametrize("name", NAMES)
def test_stages_hold_every_parameter_and_share_only_the_embedding(name):
    config = presets.get(name)
    middle = config.num_hidden_layers // 2
    depths = tuple(range(config.num_nextn_predict_layers))
    first = Part(layers=tuple(range(middle)), embed=True)
    last = Part(
        layers=tuple(range(middle, config.num_hidden_layers)), embed=bool(depths), head=True, mtp=depths
    )
    one, two = (set(hollow(config, part).state_dict()) for part in (first, last))
    assert one | two == {param.name for param in parameters(config)}
    assert one & two == ({"embed.weight"} if depths else set())
    for part, held in ((first, one), (last, two)):
        assert held == {param.name for param in parameters(config) if part.holds(param.name)}


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": True},
        {"n_shared_experts": 0},
        {"q_lora_rank": None},
        {"num_nextn_predict_layers": 3},
        {"first_k_dense_replace": 0},
        {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ],
    ids=str,
)
def test_module_and_table_agree_on_variants(change):
    config = replace(presets.get("nano"), **change)
    table = {param.name: param.shape for param in parameters(config)}
    assert {key: tuple(tensor.shape) for key, tensor in hollow(config).state_dict().items()} == table


def test_v3_on_the_meta_device_takes_seconds_and_no_memory():
    started = time.perf_counter()
    model = hollow(presets.get("deepseek-v3"))
    assert time.perf_counter() - started < 10
    assert all(tensor.is_meta for tensor in model.state_dict().values())
