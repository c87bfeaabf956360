"""An engine on several ranks gives the tokens of one rank, and ends with a reason when it loses a rank."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import forked_instances
import pytest
import torch
from processes import gone, wait_gone
from running import benthic_server
from small_engine import NANO, SHALLOW, Answer, is_empty, prompts, random_model, request, serve
from small_tokenizer import save_tokenizer
from test_overlap import mixed_requests

from benthic.errors import ConfigError, EngineDeadError, PeerLostError
from benthic.model.checkpoint import save_pretrained
from benthic.serve.client import EngineClient
from benthic.serve.engine import Engine
from benthic.serve.launch import load_engine
from benthic.serve.options import EngineOptions
from benthic.serve.speculative import Speculative
from benthic.serve.spread import SpreadEngine
from benthic.spec import hf, presets

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.dist

SMALL = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "num_blocks": 256,
    "num_threads": 1,
}
TIGHT = SMALL | {"max_num_batched_tokens": 11, "block_size": 3, "num_blocks": 36}
"""Prompts are cut into chunks, and running sequences lose their blocks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nano` with logits of order 1, in float32, so that a sum in another order changes no token."""
    folder = tmp_path_factory.mktemp("spread") / "nano"
    save_pretrained(random_model(SHALLOW, seed=1), folder, dtype=torch.float32)
    save_tokenizer(folder)
    return folder


def spread(folder: Path, size: int, **options: object) -> SpreadEngine:
    return SpreadEngine.from_pretrained(
        folder, EngineOptions(**(SMALL | {"tensor_parallel_size": size} | options))
    )


def served(engine: Engine) -> dict[str, Answer]:
    """Everything that a scheduler does: chunks, preemption, two aborts, and a prompt that it has seen."""

    def abort(step: int) -> None:
        for name in {6: ["3"], 9: ["long-1"]}.get(step, []):
            engine.abort(name)

    long = prompts(4, seed=8, shortest=12, longest=20)
    asked = [request(f"long-{i}", p, max_tokens=20) for i, p in enumerate(long)] + mixed_requests(10)
    answers = serve(engine, asked, at_step=abort)
    assert is_empty(engine)
    prompt = prompts(1, seed=2, shortest=24, longest=24)[0]
    for name in ("new", "seen"):
        answers |= serve(engine, [request(name, prompt, temperature=0.8, seed=5)])
    return answers


def same(found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    assert {n: a.tokens for n, a in found.items()} == {n: a.tokens for n, a in expected.items()}
    for name, answer in expected.items():
        for row, wanted in zip(found[name].logprobs, answer.logprobs, strict=True):
            assert [entry.token for entry in row] == [entry.token for entry in wanted]
            assert [e.logprob for e in row] == pytest.approx([e.logprob for e in wanted], abs=1e-4)
        prompt, wanted_prompt = found[name].deltas, answer.deltas
        if wanted_prompt and wanted_prompt[0].prompt_logprobs is not None:
            rows = zip(prompt[0].prompt_logprobs[1:], wanted_prompt[0].prompt_logprobs[1:], strict=True)
            assert all(row[0].logprob == pytest.approx(wanted[0].logprob, abs=1e-4) for row, wanted in rows)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Answer]:
    engine = Engine.from_pretrained(folder, EngineOptions(**TIGHT))
    answers = served(engine)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert any(answer.deltas and answer.deltas[0].prompt_logprobs for answer in answers.values())
    return answers


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (2, {"enable_expert_parallel": True, "async_scheduling": True}),
        (4, {"async_scheduling": True}),
        (4, {"enable_expert_parallel": True}),
        (2, {"host_cache_gib": 1e-3, "async_scheduling": True}),
    ],
    ids=str,
)
def test_several_ranks_give_the_tokens_of_one(
    size: int, options: dict, folder: Path, alone: dict[str, Answer]
) -> None:
    engine = spread(folder, size, **TIGHT, **options)
    try:
        found = served(engine)
        cut = {"3", "long-1"}  # an abort finds an overlapped request a token or two earlier
        same(
            {n: a for n, a in found.items() if n not in cut}, {n: a for n, a in alone.items() if n not in cut}
        )
        assert all(alone[name].tokens[: len(found[name].tokens)] == found[name].tokens for name in cut)
        assert engine.stats().preemptions > 0
        assert (engine.stats().host_hits > 0) == ("host_cache_gib" in options)
        assert is_empty(engine)
    finally:
        engine.leave()


@pytest.mark.parametrize(("method", "overlapped"), [("ngram", False), ("mtp", False), ("mtp", True)])
def test_drafts_are_verified_by_all_ranks(method, overlapped, folder: Path) -> None:
    repeated = [7, 8, 9, 10, 11, 12] * 4
    asked = [request(str(i), repeated[i:], max_tokens=20, temperature=0.3, seed=i) for i in range(5)]
    drafting = Speculative(method=method, num_speculative_tokens=3, adaptive=False)
    options = SMALL | {"speculative": drafting, "max_num_batched_tokens": 16, "async_scheduling": overlapped}
    alone = Engine.from_pretrained(folder, EngineOptions(**options))
    expected = serve(alone, asked)
    engine = spread(folder, 2, **options)
    try:
        same(serve(engine, asked), expected)
        assert engine.stats().drafts == alone.stats().drafts > 0
        assert engine.stats().accepted_tokens == alone.stats().accepted_tokens > 0
    finally:
        engine.leave()


def test_a_shard_holds_a_part_of_the_weights_and_the_whole_cache(folder: Path) -> None:
    whole = Engine.from_pretrained(folder, EngineOptions(**SMALL))
    engine = spread(folder, 4)
    try:
        held = sum(p.numel() for p in engine._runner.model.parameters())
        assert held < 0.45 * sum(p.numel() for p in whole._runner.model.parameters())
        assert engine._runner.cache.pages_LPBW.shape == whole._runner.cache.pages_LPBW.shape
        assert engine.ready() == whole.ready()
    finally:
        engine.leave()


def test_a_model_that_does_not_divide_is_refused_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(hf.dumps(presets.get("tiny")))
    with pytest.raises(ConfigError, match=r"num_attention_heads = 6 does not divide over .* = 4"):
        spread(tmp_path, 4)
    (tmp_path / "config.json").write_text(hf.dumps(replace(NANO, n_routed_experts=6, n_group=2)))
    with pytest.raises(ConfigError, match=r"n_routed_experts = 6 does not divide over .* = 4"):
        spread(tmp_path, 4, enable_expert_parallel=True)


def test_an_engine_of_one_rank_does_not_pass_for_several(folder: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2, but this engine runs on 1"):
        Engine.from_pretrained(folder, EngineOptions(**SMALL, tensor_parallel_size=2))


def test_a_rank_that_cannot_load_ends_the_start_with_its_words(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(Exception, match=r"model\.safetensors") as caught:
        spread(tmp_path, 2)
    assert "looked for" in str(caught.value)


def test_a_step_that_fails_on_rank_0_ends_all(folder: Path) -> None:
    engine = spread(folder, 2)
    try:
        pids = engine.followers.pids

        def broken(*_: object) -> None:
            msg = "a bad chip"
            raise RuntimeError(msg)

        engine._runner.steps.rows = broken
        engine.add(request("a", [3, 4, 5]))
        with pytest.raises(PeerLostError, match="rank 0 failed: RuntimeError: a bad chip"):
            engine.step()
    finally:
        engine.leave()
    assert all(gone(pid) for pid in pids)


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(text.split()[0])] = int(text.rsplit(")", 1)[1].split()[1])
    found, level = [], [pid]
    while level:
        level = [each for each, parent in parents.items() if parent in level]
        found += level
    return found


@pytest.fixture
def busy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[asyncio.Runner, EngineClient]]:
    """An engine process of two ranks, ready."""
    monkeypatch.setattr("benthic.serve.client.start_engine", forked_instances.start_engine)
    options = EngineOptions(**SMALL, tensor_parallel_size=2)

    async def start() -> EngineClient:
        client = EngineClient(functools.partial(load_engine, folder, options))
        await client.wait_ready()
        return client

    with asyncio.Runner() as runner:
        client = runner.run(start())
        yield runner, client
        runner.run(client.close())


def rank_of(name: int, client: EngineClient) -> int:
    """The process of rank 1: what the engine's fork server has forked."""
    (server,) = [
        pid for pid in children(client.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ][:1]
    return children(server)[0]


@pytest.mark.parametrize("idle", [False, True], ids=["in a step", "idle"])
def test_losing_a_rank_ends_requests_and_engine_and_names_the_rank(busy, idle) -> None:
    runner, client = busy
    family = children(client.pid)
    victim = rank_of(1, client)

    async def scenario() -> str:
        stream = client.open([request("a", [3, 4, 5], max_tokens=200)])
        await anext(stream)
        if idle:
            stream.close()
            while client.stats is None or client.stats.num_running:
                await asyncio.sleep(0.05)
        os.kill(victim, signal.SIGKILL)
        if not idle:
            with pytest.raises(EngineDeadError, match=r"rank 1 .* killed by signal 9"):
                async for _ in stream:
                    pass
        return await asyncio.wait_for(client.wait_dead(), 60)

    assert f"rank 1 (pid {victim}) was killed by signal 9" in runner.run(scenario())
    wait_gone(family)


def test_ranks_leave_with_an_engine_that_is_killed(busy) -> None:
    runner, client = busy
    family = children(client.pid)
    assert len(family) >= 2
    os.kill(client.pid, signal.SIGKILL)
    runner.run(asyncio.wait_for(client.wait_dead(), 60))
    wait_gone(family)


def test_a_server_of_two_ranks_answers_and_drains(folder: Path, tmp_path: Path) -> None:
    flags = ("--tensor-parallel-size", "2", "--enable-expert-parallel", "--max-model-len", "64")
    with benthic_server(folder, tmp_path / "log", *flags) as running:
        family = children(running.process.pid)
        body = {
            "model": str(folder),
            "prompt": [3, 4, 5],
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
        }
        usage = running.http().post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens"] == 4
    assert running.process.returncode == 0
    wait_gone(family)
    assert "whole experts on each" in (tmp_path / "log").read_text()
