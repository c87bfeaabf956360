"""Two GPUs as one engine: graphs that hold collectives, overlapped steps, FP8; the tokens of one GPU."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import Answer, is_empty, prompts, random_model, request, serve
from test_gpu import ROUND, in_error_mode
from test_overlap import mixed_requests
from test_spread import children, rank_of, wait_gone

from benthic.errors import EngineDeadError
from benthic.model.checkpoint import save_pretrained
from benthic.serve.client import EngineClient
from benthic.serve.engine import Engine
from benthic.serve.launch import load_engine
from benthic.serve.options import EngineOptions
from benthic.serve.speculative import Speculative
from benthic.serve.spread import SpreadEngine

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.serve.streams import EngineStream

pytestmark = [pytest.mark.multigpu, pytest.mark.gpu]

SMALL = {
    "device": "cuda",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "num_blocks": 256,
    "kv_cache_dtype": "auto",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread") / "round"
    save_pretrained(random_model(ROUND), folder, dtype=torch.float32)
    return folder


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    engine = Engine.from_pretrained(
        folder, EngineOptions(**SMALL, enforce_eager=True, async_scheduling=False)
    )
    return tokens(serve(engine, mixed_requests()))


@pytest.mark.parametrize("experts", [False, True], ids=["by width", "whole experts"])
@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True, "async_scheduling": False},
        {},
        {"num_blocks": 24},
        {"speculative": Speculative(method="ngram", num_speculative_tokens=2, adaptive=False)},
        {"speculative": Speculative(method="mtp", num_speculative_tokens=2, adaptive=False)},
    ],
    ids=["plain", "graphs", "graphs, few blocks", "ngram", "mtp"],
)
def test_two_gpus_give_the_tokens_of_one(experts, options: dict, folder: Path, alone: dict) -> None:
    chosen = EngineOptions(**(SMALL | options), tensor_parallel_size=2, enable_expert_parallel=experts)
    engine = SpreadEngine.from_pretrained(folder, chosen)
    try:
        graphs = engine._runner.graphs
        assert (not graphs) == ("enforce_eager" in options)
        assert all(len(each) == len(each.sizes) for each in graphs.values())
        assert tokens(serve(engine, mixed_requests())) == alone
        assert is_empty(engine)
        in_error_mode(engine)  # rank 0 waits for its tokens alone
        assert tokens(serve(engine, mixed_requests())) == alone
    finally:
        engine.leave()


@pytest.mark.parametrize("how", [{}, {"quantization": "fp8", "kv_cache_dtype": "fp8"}], ids=["wide", "fp8"])
def test_the_cache_is_sized_alike_on_both_gpus_and_narrow_numbers_stay_near(how: dict, folder: Path) -> None:
    asked = [request(str(i), p, prompt_logprobs=0) for i, p in enumerate(prompts(6, seed=4, shortest=30))]

    def measured(engine: Engine) -> torch.Tensor:
        rows = [a.deltas[0].prompt_logprobs[1:] for a in serve(engine, asked).values()]
        return torch.tensor([row[0].logprob for each in rows for row in each])

    exact = measured(Engine.from_pretrained(folder, EngineOptions(**SMALL, dtype="float32")))
    settings = (
        SMALL
        | {"num_blocks": None, "block_size": 64, "gpu_memory_utilization": 0.3, "dtype": "bfloat16"}
        | how
    )
    engine = SpreadEngine.from_pretrained(
        folder, EngineOptions(**settings, tensor_parallel_size=2, enable_expert_parallel=True)
    )
    try:
        assert engine.ready().num_blocks == engine._runner.cache.num_blocks > 256
        off = float((measured(engine) - exact).abs().median())
        assert 0 < off < (0.3 if how else 0.05)
    finally:
        engine.leave()


def test_losing_a_gpu_in_the_midst_of_steps_ends_the_engine_within_seconds_and_names_the_rank(
    folder: Path,
) -> None:
    """NCCL would wait for minutes."""

    async def rest_of(stream: EngineStream) -> None:
        async for _ in stream:
            pass

    async def scenario() -> None:
        options = EngineOptions(**SMALL, tensor_parallel_size=2)
        client = EngineClient(functools.partial(load_engine, folder, options))
        try:
            await client.wait_ready()
            family, victim = children(client.pid), rank_of(1, client)
            stream = client.open([request("a", [3, 4, 5], max_tokens=240)])
            await anext(stream)
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match=rf"rank 1 \(pid {victim}\) was killed by signal 9"):
                await asyncio.wait_for(rest_of(stream), 30)
            wait_gone(family)
        finally:
            await client.close()

    asyncio.run(scenario())
