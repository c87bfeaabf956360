"""Blocks that are evicted to host memory come back with what they held, and no token changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import Answer, is_empty, prompts, random_model, request, serve, small_engine
from small_fleet import colocated, pair
from trained import starts, trained_model

from benthic.errors import ConfigError
from benthic.sched.plans import BlockCopy
from benthic.sched.replay import replay
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.host_pages import HostPages
from benthic.serve.launch import check_instances
from benthic.serve.options import EngineOptions
from benthic.serve.sizing import host_size
from benthic.serve.speculative import Speculative
from benthic.spec import presets

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.model.network import DeepSeek
    from benthic.serve.engine import Engine
    from benthic.serve.messages import Generate

GIB = 1 << 30
TINY = {"num_blocks": 24, "max_num_seqs": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
HOST = {"host_cache_gib": 4e-3}


@pytest.fixture(scope="module")
def model() -> DeepSeek:
    return random_model()


def visits(count: int = 18) -> list[Generate]:
    """Requests with three beginnings in turn: together they are longer than the device's cache."""
    beginnings = prompts(3, seed=6, shortest=44, longest=44)
    return [
        request(str(i), beginnings[i % 3] + tail, max_tokens=6)
        for i, tail in enumerate(prompts(count, seed=7, longest=6))
    ]


def one_by_one(engine: Engine, asked: list[Generate]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for each in asked:
        answers |= serve(engine, [each])
    assert is_empty(engine)
    return answers


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"async_scheduling": True, "max_num_batched_tokens": 9},
        {"enforce_eager": True, "block_size": 3, "num_blocks": 32},
        {"host_cache_gib": 2e-5},
    ],
    ids=str,
)
def test_a_tiny_cache_with_host_memory_behind_it_gives_the_same_tokens(
    model: DeepSeek, options: dict
) -> None:
    asked, apart = visits(), TINY | {k: v for k, v in options.items() if k != "host_cache_gib"}
    expected = serve(small_engine(model, **(apart | {"num_blocks": 256})), asked)
    engine = small_engine(model, **(TINY | HOST | options))
    assert tokens(serve(engine, asked)) == tokens(expected)
    assert tokens(one_by_one(engine, asked)) == tokens(expected)
    stats = engine.stats()
    assert stats.host_bytes_out > 0
    assert 0 < stats.host_blocks_held <= stats.host_blocks
    assert is_empty(engine)


def test_a_hit_in_host_memory_saves_its_prefill(model: DeepSeek) -> None:
    asked, computed = visits(), []
    for options in ({}, HOST):
        engine = small_engine(model, **TINY, **options)
        one_by_one(engine, asked)
        computed.append(engine._scheduler.totals.scheduled_tokens)
    stats = engine.stats()
    assert stats.host_hits > 15 * 36
    assert computed[0] - computed[1] == stats.host_hits
    assert stats.host_bytes_in == stats.host_hits * engine._runner.cache.layout.token_bytes


def test_preempted_requests_get_their_blocks_back_from_host_memory(model: DeepSeek) -> None:
    asked = [
        request(str(i), p, max_tokens=24) for i, p in enumerate(prompts(4, seed=8, shortest=12, longest=20))
    ]
    expected = tokens(serve(small_engine(model), asked))
    recomputed = []
    for overlapped in (False, True):
        for options in ({}, HOST):
            engine = small_engine(model, num_blocks=16, async_scheduling=overlapped, **options)
            assert tokens(serve(engine, asked)) == expected
            assert engine.stats().preemptions > 0
            recomputed.append(engine._scheduler.totals.recomputed)
    assert recomputed[1] < recomputed[0]
    assert recomputed[3] < recomputed[2]


@pytest.mark.parametrize(("method", "overlapped"), [("mtp", False), ("mtp", True), ("ngram", False)])
def test_drafts_are_verified_over_blocks_that_came_back(method: str, overlapped: bool) -> None:  # noqa: FBT001
    asked = [request(str(i), p, max_tokens=12) for i, p in enumerate(starts(8, seed=2))]
    trained = trained_model()
    expected = tokens(serve(small_engine(trained), asked))
    drafting = Speculative(method=method, num_speculative_tokens=3, adaptive=False)
    longest = max(-(-(len(each.prompt) + 12) // 4) for each in asked)
    engine = small_engine(
        trained, num_blocks=longest + 2, speculative=drafting, async_scheduling=overlapped, **HOST
    )
    for _ in range(3):
        assert tokens(serve(engine, asked)) == expected
    stats = engine.stats()
    assert stats.host_hits > 0
    assert stats.accepted_tokens > 0
    assert is_empty(engine)


def test_a_step_that_fails_has_made_its_copies(model: DeepSeek, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = visits(6)
    expected = tokens(one_by_one(small_engine(model), asked))
    engine = small_engine(model, **TINY, **HOST)
    run, failed = engine._runner.run, []

    def failing(plan, drafts=None):
        if plan.to_host and not failed:
            failed.append(plan)
            msg = "tried to allocate 20 GiB"
            raise torch.OutOfMemoryError(msg)
        return run(plan, drafts)

    monkeypatch.setattr(engine._runner, "run", failing)
    first = one_by_one(engine, asked)
    assert [answer.finish for answer in first.values()].count("error") == 1
    assert failed[0].to_host
    again = one_by_one(engine, asked)
    assert tokens(again) == expected
    assert engine.stats().host_hits > 0


def test_a_recorded_run_with_host_memory_replays_to_the_same_plans(model: DeepSeek, tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    engine = small_engine(model, async_scheduling=True, record=str(file), **TINY, **HOST)
    serve(engine, visits())
    one_by_one(engine, visits(6))
    replayed = replay(file.read_text().splitlines())
    assert replayed.totals.host_blocks_in == engine._scheduler.totals.host_blocks_in > 0


def test_instances_that_prefill_and_pull_keep_what_they_evict() -> None:
    asked = visits(9)
    expected = colocated(asked)
    small = {"num_blocks": 24} | HOST
    with pair(owner=small, reader=small) as both:
        for each in asked:
            assert both.decode(each, both.prefill(each)) == expected[each.request_id]
            both.settle()
        assert both.owner.stats().host_hits > 0
        assert both.reader.stats().host_hits > 0
        assert is_empty(both.owner)
        assert is_empty(both.reader)


def check_copies(device: str, dtype: torch.dtype) -> None:
    """Out, in and both at once: blocks arrive where they belong, and no other changes."""
    layout = CacheLayout(layers=3, latent_dim=20, block_size=4, dtype=dtype)
    cache = LatentCache(layout, 5, torch.device(device), host_blocks=7)
    stored = cache.pages_LPBW.view(torch.uint8)
    stored.copy_(torch.arange(stored.numel(), device=device).view(stored.shape).remainder(101))
    before = stored.clone()
    cache.move((BlockCopy(4, 6), BlockCopy(0, 2)), ())
    stored[:, [0, 4]] = 0
    cache.move((BlockCopy(1, 0),), (BlockCopy(1, 6), BlockCopy(4, 2)))
    cache.move((), (BlockCopy(3, 0),))
    assert torch.equal(stored[:, [1, 4, 3, 2]], before[:, [4, 0, 1, 2]])
    assert not stored[:, 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_go_to_the_host_and_come_back_as_they_were(dtype: torch.dtype) -> None:
    check_copies("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_stores_blocks_in_locked_memory_and_loads_them_back(dtype: torch.dtype) -> None:
    check_copies("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_gpu_with_host_memory_gives_the_same_tokens_and_waits_for_no_copy(overlapped: bool) -> None:  # noqa: FBT001
    from test_gpu import gpu_model, in_error_mode

    asked = visits()
    expected = tokens(serve(small_engine(gpu_model()), asked))
    engine = small_engine(gpu_model(), async_scheduling=overlapped, **TINY, host_cache_gib=0.1)
    assert tokens(serve(engine, asked)) == expected
    in_error_mode(engine)
    assert tokens(serve(engine, asked)) == expected
    assert engine.stats().host_hits > 0


def test_host_blocks_are_as_many_as_fit_and_are_shared_by_ranks() -> None:
    layout = CacheLayout.of(presets.get("nano"), block_size=4, dtype=torch.float32)
    asked = EngineOptions(host_cache_gib=10 * layout.block_bytes / GIB)
    assert host_size(layout, asked).num_blocks == 10
    assert "host_cache_gib" in host_size(layout, asked).reason
    two = EngineOptions(host_cache_gib=10 * layout.block_bytes / GIB, tensor_parallel_size=2)
    assert host_size(layout, two).num_blocks == 5
    assert host_size(layout, EngineOptions()).num_blocks == 0
    pages = torch.zeros(3, 2, 4, 20)
    assert HostPages(pages, 10).num_bytes == 10 * layout.block_bytes


def test_host_memory_that_cannot_be_is_refused_with_both_numbers() -> None:
    layout = CacheLayout.of(presets.get("nano"), block_size=4, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"host_cache_gib = 10000000\.0 asks for 10,737,418,240,000,000"):
        host_size(layout, EngineOptions(host_cache_gib=1e7))
    with pytest.raises(ConfigError, match=r"1 bytes \(host_cache_gib = .*one block of 4 tokens takes 960"):
        host_size(layout, EngineOptions(host_cache_gib=1 / GIB))
    with pytest.raises(ConfigError, match=r"host_cache_gib = -1\.0, but it must be at least 0"):
        EngineOptions(host_cache_gib=-1.0)
    with pytest.raises(ConfigError, match="enable_prefix_caching = False; leave out one"):
        EngineOptions(host_cache_gib=1.0, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match=r"--host-cache-gib 2\.0, but --kv-nixl"):
        check_instances(EngineOptions(host_cache_gib=2.0), prefill=0, decode=0, kv_port=5000, kv_nixl=True)
