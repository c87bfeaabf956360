"""Two GPUs that share experts: graphs that hold the exchange, overlapped steps; the tokens of one GPU."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import Answer, random_model
from small_engine import serve as serve_alone
from spawn import spawn
from test_data_rank import ABORTED, LATE, LONG, collected, drafting, lose_one, same, scripts_of
from test_gpu import ROUND
from test_overlap import mixed_requests
from together import SETTINGS, take_part

from benthic.model.checkpoint import save_pretrained
from benthic.serve.engine import Engine
from benthic.serve.options import EngineOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.multigpu, pytest.mark.gpu]

ON_GPU = {"device": "cuda", "block_size": 4, "num_blocks": 24, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "round"
    save_pretrained(random_model(ROUND), folder, dtype=torch.float32)
    return folder


def alone(folder: Path, dtype: str) -> dict[str, Answer]:
    settings = SETTINGS | ON_GPU | {"enable_expert_parallel": False, "dtype": dtype}
    engine = Engine.from_pretrained(
        folder, EngineOptions(**settings, enforce_eager=True, async_scheduling=False)
    )
    return serve_alone(engine, [*LONG, *mixed_requests(9), *LATE])


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True, "async_scheduling": False},
        {},
        {"speculative": drafting("ngram", 2)},
        {"speculative": drafting("mtp", 2)},
    ],
    ids=["plain", "graphs", "ngram", "mtp"],
)
def test_two_gpus_that_share_experts_give_the_tokens_of_one(
    options: dict, folder: Path, tmp_path: Path
) -> None:
    expected = alone(folder, "float32")
    everything = ON_GPU | {"dtype": "float32"} | options
    spawn(
        take_part, 2, 2, str(folder), str(tmp_path), everything, scripts_of(2, 2), seconds=300, device="cuda"
    )
    found, stats, sizes = collected(tmp_path, 2)
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        if name in ABORTED:
            assert expected[name].tokens[: len(answer.tokens)] == answer.tokens
        else:
            same(answer, expected[name])
    assert sizes[0] == sizes[1]
    assert any(turn.size for turn in sizes[0]) == ("enforce_eager" not in options), (
        "graphs were to be replayed"
    )
    assert all(report.num_free_blocks == report.num_blocks for report in stats)


def test_in_bfloat16_most_tokens_are_those_of_one_gpu_and_probabilities_stay_near(
    folder: Path, tmp_path: Path
) -> None:
    expected = alone(folder, "bfloat16")
    everything = ON_GPU | {"dtype": "bfloat16"}
    spawn(
        take_part, 2, 2, str(folder), str(tmp_path), everything, scripts_of(2, 3), seconds=300, device="cuda"
    )
    found, _, sizes = collected(tmp_path, 2)
    kept = [name for name in found if name not in ABORTED]
    pairs = [pair for n in kept for pair in zip(found[n].tokens, expected[n].tokens, strict=False)]
    share = sum(a == b for a, b in pairs) / len(pairs)
    off = sorted(
        abs(row[0].logprob - wanted[0].logprob)
        for n in kept
        for row, wanted in zip(prompt_rows(found[n]), prompt_rows(expected[n]), strict=True)
    )
    assert share > 0.6, f"{share:.1%} of tokens are the same; sizes {sizes[0]}"
    assert off[len(off) // 2] < 0.05, f"log-probabilities are off by {off[len(off) // 2]:.3f} in the median"


def prompt_rows(answer: Answer) -> tuple:
    """Log-probabilities of prompt tokens, where they were asked for."""
    return (answer.deltas[0].prompt_logprobs or ())[1:]


def test_losing_a_gpu_in_the_midst_of_steps_ends_the_other_within_seconds(folder: Path) -> None:
    """NCCL would wait for minutes."""
    settings = SETTINGS | ON_GPU | {"num_blocks": 96}
    options = EngineOptions(**settings, data_parallel_size=2)
    asyncio.run(asyncio.wait_for(lose_one(folder, options, idle=False), 120))
