"""The latent cache: how large a block is, how many there are, and why."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import ConfigError
from benthic.serve.cache import CacheLayout, LatentCache, size_by_bytes
from benthic.serve.options import EngineOptions
from benthic.serve.sizing import cache_size
from benthic.spec import presets

CPU = torch.device("cpu")


def layout(name: str, *, block_size: int = 64, mtp_layers: int = 0) -> CacheLayout:
    return CacheLayout.of(
        presets.get(name), block_size=block_size, dtype=torch.bfloat16, mtp_layers=mtp_layers
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [("deepseek-v3", 70_272), ("deepseek-v2", 69_120), ("deepseek-v2-lite", 31_104), ("kimi-k2", 70_272)],
)
def test_a_token_takes_the_published_bytes(name: str, published: int) -> None:
    assert layout(name).token_bytes == published
    assert layout(name).block_bytes == 64 * published


def test_a_drafting_layer_has_pages_of_its_own() -> None:
    assert layout("deepseek-v3", mtp_layers=1).token_bytes == 71_424


def test_the_budget_holds_as_many_whole_blocks_as_fit_and_says_so() -> None:
    size = size_by_bytes(layout("deepseek-v3"), 30_900_000_000, source="kv_cache_memory")
    assert size.num_blocks == 30_900_000_000 // (64 * 70_272) == 6870
    assert all(word in size.reason for word in ("6,870", "70,272", "30,900,000,000", "kv_cache_memory"))


def test_a_budget_below_one_block_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"4,497,407 bytes \(here\).*4,497,408"):
        size_by_bytes(layout("deepseek-v3"), 64 * 70_272 - 1, source="here")


def test_pages_of_a_layer_and_its_slots_are_the_same_memory() -> None:
    cache = LatentCache(layout("nano", block_size=4), 5, CPU)
    cache.slots(1)[4 * 3 + 2] = 7.0
    assert (cache.pages_LPBW[1, 3, 2] == 7.0).all()
    assert cache.layer(1).shape == (5, 4, 20)
    assert (cache.pages_LPBW != 0).sum() == 20
    assert cache.num_bytes == cache.pages_LPBW.nbytes


def test_an_explicit_number_of_blocks_wins_over_everything() -> None:
    assert cache_size(layout("nano"), EngineOptions(num_blocks=7), 256, CPU).num_blocks == 7


def test_a_cpu_gets_room_for_all_sequences_up_to_a_gibibyte() -> None:
    small = cache_size(layout("nano", block_size=16), EngineOptions(max_num_seqs=3), 250, CPU)
    assert small.num_blocks == 3 * 16
    large = cache_size(layout("deepseek-v3"), EngineOptions(max_num_seqs=64), 163_840, CPU)
    assert large.num_blocks == (1 << 30) // (64 * 70_272)
    assert "max_num_seqs = 64" in large.reason


def test_memory_in_bytes_is_taken_when_given() -> None:
    found = cache_size(layout("nano", block_size=1), EngineOptions(kv_cache_memory=1200), 256, CPU)
    assert found.num_blocks == 1200 // (3 * 20 * 2)


@pytest.mark.gpu
def test_a_gpu_gives_the_cache_what_weights_and_activations_leave() -> None:
    device = torch.device("cuda", 0)
    free, total = torch.cuda.mem_get_info(device)
    found = cache_size(
        layout("deepseek-v3"), EngineOptions(device="cuda", gpu_memory_utilization=0.5), 4096, device
    )
    expected = (int(total * 0.5) - (total - free) - (2 << 30)) // (64 * 70_272)
    assert abs(found.num_blocks - expected) <= 16
    assert "0.50" in found.reason
