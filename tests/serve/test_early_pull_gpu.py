"""Two instances on one GPU: blocks of a prompt move, once they are written, while the rest is computed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import random_model, serve
from small_fleet import replace_params
from test_gpu import ROUND
from test_instance_ranks import ASKED, ENGINE, MTP, fleet
from test_router import all_of, nothing_left

from benthic.model.checkpoint import save_pretrained
from benthic.serve.engine import Engine
from benthic.serve.options import EngineOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

SIZES = ENGINE | {"device": "cuda", "num_blocks": 512, "enforce_eager": False}
LONG = [replace_params(each, prompt=each.prompt * 6) for each in ASKED]


@pytest.mark.parametrize(
    "options",
    [{}, {"async_scheduling": False}, {"speculative": MTP}],
    ids=["planned ahead", "step by step", "drafting"],
)
def test_long_prompts_that_are_pulled_early_have_the_tokens_of_one_engine(
    options: dict, tmp_path: Path
) -> None:
    folder = tmp_path / "round"
    save_pretrained(random_model(ROUND), folder, dtype=torch.float32)
    engine = Engine.from_pretrained(folder, EngineOptions(**(SIZES | {"async_scheduling": False})))
    expected = {name: answer.tokens for name, answer in serve(engine, LONG).items()}
    del engine

    async def scenario() -> None:
        async with fleet(folder, 1, 1, **(SIZES | {"max_num_batched_tokens": 24} | options)) as router:
            assert await asyncio.wait_for(all_of(router, LONG), 120) == expected
            await nothing_left(router)
            assert (
                router.stats.early_blocks > 0
            )  # how many there are is for the host's speed to say: 81 to 300 of 318
            assert router.retried == 0

    asyncio.run(scenario())
