"""A rank's shard is the part of every parameter that its box names, however the checkpoint stores it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.errors import ConfigError
from benthic.model.block_scaled import load_block_scaled
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.dummy import random_weights
from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.model.sharded import load_shard
from benthic.spec import presets
from benthic.spec.parameters import parameters
from benthic.spec.shard import Shard

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.spec.model import ModelConfig

NANO = presets.get("nano")
BLOCKS = replace(  # every width is whole FP8 blocks on two ranks
    NANO,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=256,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    num_nextn_predict_layers=0,
)
CPU = torch.device("cpu")


def saved(folder: Path, config: ModelConfig, *, fp8: bool = False) -> Path:
    model = DeepSeek(config)
    initialise(model, 0)
    save_pretrained(model, folder / config.name, dtype=torch.float32, fp8=fp8)
    return folder / config.name


@pytest.mark.parametrize("whole_experts", [False, True], ids=["by width", "whole experts"])
@pytest.mark.parametrize("mtp", [False, True], ids=["layers", "with MTP"])
def test_every_rank_reads_its_box_and_all_boxes_make_the_model(tmp_path: Path, whole_experts, mtp) -> None:
    folder = saved(tmp_path, NANO)
    whole = load_pretrained(folder, mtp=mtp).state_dict()
    covered = dict.fromkeys(whole, 0)
    for index in range(4):
        shard = Shard(index=index, size=4, whole_experts=whole_experts)
        model, scales = load_shard(folder, shard, device=CPU, mtp=mtp)
        assert not scales
        held = model.state_dict()
        assert held.keys() == whole.keys()
        for param in parameters(model.config):
            box = shard.box(param)
            assert torch.equal(held[param.name], whole[param.name][box]), param.name
            covered[param.name] += held[param.name].numel()
    divided = {name for name, count in covered.items() if count == whole[name].numel()}
    assert all(count in (whole[name].numel(), 4 * whole[name].numel()) for name, count in covered.items())
    assert {"embed.weight", "head.weight", "layers.1.moe.experts.down", "layers.0.attn.o.weight"} <= divided
    assert "layers.0.attn.kv_a.weight" not in divided


@pytest.mark.parametrize("whole_experts", [False, True], ids=["by width", "whole experts"])
@pytest.mark.parametrize("index", [0, 1])
def test_fp8_weights_are_cut_between_blocks_with_their_scales(
    tmp_path: Path, whole_experts, index: int
) -> None:
    folder = saved(tmp_path, BLOCKS, fp8=True)
    model, scales = load_block_scaled(folder, device=CPU)
    shard = Shard(index=index, size=2, whole_experts=whole_experts)
    part, own = load_shard(folder, shard, device=CPU, narrow=True)
    assert own.keys() == scales.keys()
    whole, held = model.state_dict(), part.state_dict()
    for param in parameters(part.config):
        box = shard.box(param)
        found, wanted = held[param.name], whole[param.name][box]
        assert found.dtype == wanted.dtype, param.name
        assert torch.equal(found.float(), wanted.float()), param.name
        if param.name in scales:
            tiles = tuple(slice(s.start // 128, -(-s.stop // 128)) for s in box[-2:])
            assert torch.equal(own[param.name], scales[param.name][(*box[:-2], *tiles)]), param.name


def test_fp8_weights_widened_for_one_rank_are_those_widened_for_all(tmp_path: Path) -> None:
    config = replace(BLOCKS, moe_intermediate_size=192)  # borders lie inside blocks
    folder = saved(tmp_path, config, fp8=True)
    whole = load_pretrained(folder, dtype=torch.float32, mtp=False).state_dict()
    shard = Shard(index=1, size=2)
    held = load_shard(folder, shard, device=CPU, dtype=torch.float32)[0].state_dict()
    for param in parameters(config):
        assert torch.equal(held[param.name], whole[param.name][shard.box(param)]), param.name


def test_a_border_inside_an_fp8_block_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = saved(tmp_path, replace(BLOCKS, moe_intermediate_size=192), fp8=True)
    with pytest.raises(ConfigError, match="192 rows or columns over 2 ranks are 96 each"):
        load_shard(folder, Shard(size=2), device=CPU, narrow=True)


def test_random_weights_of_a_shard_are_a_part_of_the_whole_models(tmp_path: Path) -> None:
    whole = random_weights(NANO, CPU, torch.float32, seed=3).state_dict()
    shard = Shard(index=1, size=2)
    held = random_weights(NANO, CPU, torch.float32, seed=3, shard=shard)
    for param in parameters(held.config):
        assert torch.equal(held.state_dict()[param.name], whole[param.name][shard.box(param)]), param.name


@pytest.mark.parametrize(
    ("config", "size", "whole_experts", "words"),
    [
        (presets.get("tiny"), 4, False, "num_attention_heads = 6 .* tensor_parallel_size = 4"),
        (replace(NANO, vocab_size=321), 2, False, "vocab_size = 321 .* tensor_parallel_size = 2"),
        (NANO, 32, False, "moe_intermediate_size = 16 .* = 32"),
        (NANO, 16, True, "n_routed_experts = 8 .* = 16"),
    ],
)
def test_what_does_not_divide_is_named_with_both_numbers(config, size, whole_experts, words) -> None:
    with pytest.raises(ConfigError, match=words):
        Shard(size=size, whole_experts=whole_experts).check(config)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "moonlight-16b-a3b"])
@pytest.mark.parametrize("whole_experts", [False, True])
def test_released_models_divide_over_eight_ranks(name: str, whole_experts) -> None:
    Shard(size=8, whole_experts=whole_experts).check(presets.get(name))
