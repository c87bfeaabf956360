"""Instances of several ranks hand blocks over: the tokens of one engine, whatever each side's parallelism."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import forked_ranks
import pytest
import torch
from processes import wait_gone
from small_engine import random_model, serve
from small_fleet import replace_params
from test_router import all_of, nothing_left, seeded, tokens_of, until
from test_spread import children

from benthic.errors import ConfigError
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.sharded import load_shard
from benthic.serve.engine import Engine
from benthic.serve.fleet import Fleet, FleetOptions, start_router
from benthic.serve.instance import digest_of
from benthic.serve.journal import Journal
from benthic.serve.launch import check_instances
from benthic.serve.options import EngineOptions
from benthic.serve.seats import Seat, Seats
from benthic.serve.speculative import Speculative
from benthic.spec.shard import Shard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benthic.serve.router import Router

pytestmark = pytest.mark.dist

ENGINE = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "num_blocks": 96,
    "num_threads": 1,
    "enforce_eager": True,
}
MTP = Speculative(method="mtp", num_speculative_tokens=2, adaptive=False)
ASKED = seeded(12, seed=4, longest=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nano` with logits of order 1, in float32, so that a sum in another order changes no token."""
    folder = tmp_path_factory.mktemp("ranks") / "nano"
    save_pretrained(random_model(), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    engine = Engine.from_pretrained(folder, EngineOptions(**ENGINE))
    return {name: answer.tokens for name, answer in serve(engine, ASKED).items()}


@pytest.fixture(autouse=True)
def _processes_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benthic.serve.client.start_engine", forked_ranks.start_engine)


@asynccontextmanager
async def fleet(folder: Path, prefill_ranks: int, decode_ranks: int, **options) -> AsyncIterator[Router]:
    """One instance of each kind; what dies is not replaced."""
    sides = FleetOptions(
        prefill=1, decode=1, prefill_ranks=prefill_ranks, decode_ranks=decode_ranks, restarts=0
    )
    made = Fleet(checkpoint=folder, engine=EngineOptions(**(ENGINE | options)), options=sides)
    router = start_router(made, journal=Journal(time.monotonic), stall_s=60.0, log_level=40)
    families = []
    try:
        await router.wait_ready()
        families = [pid for member in router.members for pid in children(member.client.pid)]
        yield router
    finally:
        await router.close()
    assert len(families) >= prefill_ranks + decode_ranks - 2
    wait_gone(families)


@pytest.mark.parametrize(
    ("ranks", "options", "victim"),
    [
        ((2, 1), {}, "prefill"),
        ((1, 2), {"async_scheduling": True}, "decode"),
        ((2, 2), {"enable_expert_parallel": True, "speculative": MTP}, None),
    ],
    ids=["2 and 1", "1 and 2", "2 and 2, drafting"],
)
def test_instances_of_any_ranks_answer_as_one_engine_does_and_go_on_without_one_that_loses_a_rank(
    ranks, options, victim, folder, expected
) -> None:
    async def scenario() -> None:
        async with fleet(folder, *ranks, **options) as router:
            assert await asyncio.wait_for(all_of(router, ASKED), 60) == expected
            await nothing_left(router)
            assert router.stats.pulled_blocks > 30
            assert router.retried == 0
            if victim is not None:
                (member,) = [member for member in router.members if member.role == victim]
                await lose_a_rank(router, *children(member.client.pid), expected)

    asyncio.run(scenario())


@pytest.mark.parametrize(("ranks", "options"), [((2, 1), {}), ((1, 2), {"speculative": MTP})])
def test_every_rank_has_pulled_most_of_a_long_prompt_before_its_end(ranks, options, folder) -> None:
    asked = [replace_params(each, prompt=each.prompt * 6) for each in ASKED[:5]]
    engine = Engine.from_pretrained(folder, EngineOptions(**(ENGINE | {"num_blocks": 512})))
    answers = {name: answer.tokens for name, answer in serve(engine, asked).items()}
    sizes = {"num_blocks": 512, "max_num_batched_tokens": 16}

    async def scenario() -> float:
        async with fleet(folder, *ranks, **sizes, **options) as router:
            assert await asyncio.wait_for(all_of(router, asked), 60) == answers
            await nothing_left(router)
            assert router.retried == 0
            return router.stats.early_blocks / router.stats.pulled_blocks

    shares: list[float] = []
    while not shares or (shares[-1] <= 0.4 and len(shares) < 4):  # a busy machine may run a prompt unwatched
        shares.append(asyncio.run(scenario()))
    assert shares[-1] > 0.4, shares


async def lose_a_rank(router: Router, victim: int, expected: dict[str, list[int]]) -> None:
    """The error names it, requests get the tokens they would have got, and the other side loses no block."""
    answers = asyncio.create_task(all_of(router, ASKED))
    await until(lambda: any(each.loads for each in router.members))
    os.kill(victim, signal.SIGKILL)
    assert await asyncio.wait_for(answers, 60) == expected
    await until(lambda: len(router.members) == 1)
    await nothing_left(router)
    assert f"rank 1 (pid {victim}) was killed by signal 9" in router.members._last_words
    again = replace_params(ASKED[0], request_id="again")
    assert await tokens_of(router, again) == expected[ASKED[0].request_id]


def test_shards_of_one_model_have_its_fingerprint_and_another_model_does_not(folder: Path) -> None:
    whole = digest_of(load_pretrained(folder, mtp=False))
    for size, whole_experts in ((2, False), (4, False), (4, True)):
        shard, _ = load_shard(
            folder, Shard(size=size, whole_experts=whole_experts), device=torch.device("cpu")
        )
        assert digest_of(shard) == whole
    other = load_pretrained(folder, mtp=False)
    with torch.no_grad():
        other.head.weight[0, 1] += 1.0
    assert digest_of(other) != whole


def test_instances_take_gpus_that_nobody_has() -> None:
    seats = Seats(shared=False)
    assert [seats.take("a", 2).device("auto", 2, 8), seats.take("b", 1).device("cuda", 1, 8)] == [
        "cuda:0",
        "cuda:2",
    ]
    assert seats.take("c", 2).device("cuda:3", 2, 8) == "cuda:6"
    seats.leave("a")
    assert seats.take("d", 1) == Seat(0, shared=False)
    assert seats.take("e", 2) == Seat(5, shared=False)
    assert seats.take("f", 1) == Seat(1, shared=False)
    with pytest.raises(ConfigError, match=r"2 ranks takes its GPUs from cuda:5 on, so 7 .* torch sees 6"):
        Seat(5, shared=False).device("auto", 2, 6)
    assert Seat(5).device("auto", 1, 2) == "cuda:1"
    assert Seat(5, shared=False).device("auto", 2, 0) == "cpu"
    with pytest.raises(ConfigError, match="torch sees 0 GPUs"):
        Seat().device("cuda", 1, 0)


def test_ranks_that_cannot_be_are_refused_with_the_flags() -> None:
    def refused(says: str, **how: object) -> None:
        with pytest.raises(ConfigError, match=says):
            check_instances(EngineOptions(), **({"prefill": 1, "decode": 1, "kv_port": None} | how))

    refused("--cluster auto gives an instance 1 GPU, but it is to have 4", cluster="auto", decode_ranks=4)
    refused(
        "--prefill-tensor-parallel-size 2 .* but --prefill 0 and --decode 0 start none",
        prefill=0,
        decode=0,
        prefill_ranks=2,
    )

    alone = {"prefill": 0, "decode": 0}
    refused("--kv-nixl moves blocks between servers, but", **alone, kv_nixl=True)
    refused("--prefill-policy shortest_queue chooses among", **alone, prefill_policy="shortest_queue")
    refused("--local-prefill-tokens 0 is about prompts that would move", **alone, local_tokens=0)
    refused("--kv-host 1.2.3.4 is where others reach --kv-port", **alone, kv_host="1.2.3.4")

    def unlike(engine: EngineOptions, **sides: object) -> None:
        Fleet(checkpoint=Path(), engine=engine, options=FleetOptions(prefill=2, decode=1, **sides))

    with pytest.raises(ConfigError, match=r"--replan 30 .* have 2 and 1 tensor-parallel ranks"):
        unlike(EngineOptions(), replan_s=30.0, prefill_ranks=2)
    unlike(EngineOptions(tensor_parallel_size=2), replan_s=30.0, prefill_ranks=2)
    with pytest.raises(ConfigError, match="batch_invariant = True needs tensor_parallel_size = 1, not 2"):
        unlike(EngineOptions(batch_invariant=True), decode_ranks=2)
