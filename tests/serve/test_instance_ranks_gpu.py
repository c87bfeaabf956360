"""Prefill and decode instances of two GPUs each, whose ranks all pull: the tokens of one GPU."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import random_model, serve
from test_gpu import ROUND
from test_instance_ranks import ASKED, ENGINE, MTP, fleet, lose_a_rank
from test_router import all_of, nothing_left
from test_spread import rank_of

from benthic.model.checkpoint import save_pretrained
from benthic.serve.engine import Engine
from benthic.serve.options import EngineOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.multigpu, pytest.mark.gpu]

ON_GPUS = {"device": "cuda", "enforce_eager": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "round"
    save_pretrained(random_model(ROUND), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    options = EngineOptions(**(ENGINE | {"device": "cuda", "async_scheduling": False}))
    engine = Engine.from_pretrained(folder, options)
    return {name: answer.tokens for name, answer in serve(engine, ASKED).items()}


@pytest.mark.parametrize(
    ("ranks", "options", "victim"),
    [
        ((2, 2), {}, "decode"),
        ((2, 1), {"speculative": MTP}, "prefill"),
        ((1, 2), {"enable_expert_parallel": True}, None),
    ],
    ids=["2 and 2", "2 and 1, drafting", "1 and 2"],
)
def test_instances_of_several_gpus_answer_as_one_gpu_does(ranks, options, victim, folder, expected) -> None:
    if torch.cuda.device_count() < sum(ranks):
        pytest.skip(f"needs {sum(ranks)} CUDA GPUs, found {torch.cuda.device_count()}")

    async def scenario() -> None:
        async with fleet(folder, *ranks, **(ON_GPUS | options)) as router:
            assert await asyncio.wait_for(all_of(router, ASKED), 120) == expected
            await nothing_left(router)
            assert router.stats.pulled_blocks > 30
            assert router.retried == 0
            if victim is not None:
                (member,) = [member for member in router.members if member.role == victim]
                await lose_a_rank(router, rank_of(1, member.client), expected)

    asyncio.run(scenario())
